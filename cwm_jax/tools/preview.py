"""Shows a data folder: a video of episodes with keys, a contact sheet, a page of statistics.

    python -m cwm_jax.tools.preview --data data/coinrun --n-episodes 5 --output preview.mp4
    python -m cwm_jax.tools.preview --shard data/coinrun/train/data_0001.array_record --fps 15

Next to the video it writes a contact sheet (preview.png) and a page (preview.html) with the lengths
of the episodes, the frequency of each action, and the mean of all frames.
"""

import argparse
import base64
import collections
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cwm_jax import controls, files, shipped
from cwm_jax.coinrun import FPS
from cwm_jax.controls import Controls
from cwm_jax.data import inferred_actions, shards
from cwm_jax.data.clips import Episodes
from cwm_jax.data.records import Episode
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.rendering import arrow_keys, key_panel, text, video
from cwm_jax.rendering.contact_sheet import enlarged

_COLUMNS = 10  # in a row of the sheet
_HEADER = 30


class Facts(NamedTuple):
    """Statistics of some episodes."""

    lengths: dict[int, int]  # number of episodes by number of frames
    actions: np.ndarray  # how often each action was pressed, int [A]
    mean_frame: np.ndarray  # uint8 [H, W, C]


def facts(episodes: Episodes, numbers: Sequence[int], known: Controls) -> Facts:
    """Counts over the episodes with these numbers."""
    lengths, total, frames = collections.Counter(), 0.0, 0
    actions = np.zeros(known.num_values, int)
    for number in tqdm(numbers, "counting", unit=" episodes"):
        episode = episodes[number]
        lengths[len(episode)] += 1
        actions += np.bincount(episode.actions, minlength=known.num_values)
        total = total + episode.frames.sum(axis=0, dtype=np.float64)
        frames += len(episode)
    return Facts(dict(sorted(lengths.items())), actions, (total / frames).round().astype(np.uint8))


def video_images(
    episodes: Episodes, numbers: Sequence[int], known: Controls, *, scale: int
) -> Iterator[np.ndarray]:
    """The images of a video: each frame below its number and above the pressed keys."""
    for number in numbers:
        episode = episodes[number]
        for t in range(len(episode)):
            place = f"episode {number}   frame {t + 1} / {len(episode)}"
            yield _video_image(episode, t, known, place, scale)


def _video_image(episode: Episode, t: int, known: Controls, place: str, scale: int) -> np.ndarray:
    picture = enlarged(episode.frames[t], scale)
    width = picture.shape[1]
    header = Image.new("RGB", (width, _HEADER), arrow_keys.BACKDROP)
    spot = (width / 2, _HEADER / 2)
    ImageDraw.Draw(header).text(spot, place, arrow_keys.BRIGHT, arrow_keys.font(14), anchor="mm")
    panel = key_panel.render(known, int(episode.actions[t]), width=width)
    return np.concatenate([np.array(header), picture, panel])


def contact_sheet(
    episodes: Episodes, numbers: Sequence[int], known: Controls, *, scale: int = 2
) -> np.ndarray:
    """A row of evenly spaced frames for each episode: uint8 [H, W, 3]."""
    rows = []
    for number in numbers:
        episode = episodes[number]
        times = np.linspace(0, len(episode) - 1, min(len(episode), _COLUMNS)).round().astype(int)
        tiles = [_sheet_cell(episode, t, known, scale) for t in times]
        blank = np.full_like(tiles[0], arrow_keys.BACKDROP)
        rows.append(np.concatenate(tiles + [blank] * (_COLUMNS - len(tiles)), axis=1))
        title = Image.new("RGB", (rows[0].shape[1], 22), arrow_keys.BACKDROP)
        words = f"episode {number}, {len(episode)} frames"
        ImageDraw.Draw(title).text(
            (6, 11), words, arrow_keys.BRIGHT, arrow_keys.font(12), anchor="lm"
        )
        rows.insert(-1, np.array(title))
    return np.concatenate(rows)


def _sheet_cell(episode: Episode, t: int, known: Controls, scale: int) -> np.ndarray:
    picture = enlarged(episode.frames[t], scale)
    tile = Image.new("RGB", (picture.shape[1] + 6, picture.shape[0] + 20), arrow_keys.BACKDROP)
    tile.paste(Image.fromarray(picture), (3, 0))
    words = f"{t + 1} {known.name(int(episode.actions[t]))}"
    spot = (tile.width / 2, tile.height - 10)
    text.render(ImageDraw.Draw(tile), spot, words, arrow_keys.DIM, 10, most=tile.width)
    return np.array(tile)


def page(found: Facts, known: Controls, *, source: str, of: int, note: str | None = None) -> str:
    """The statistics as one self-contained HTML page; `note` is about the actions."""
    count = sum(found.lengths.values())
    frames = sum(length * n for length, n in found.lengths.items())
    png = io.BytesIO()
    Image.fromarray(enlarged(found.mean_frame, 4)).save(png, format="PNG")
    mean = base64.b64encode(png.getvalue()).decode()
    lengths = _bars({f"{length} frames": n for length, n in found.lengths.items()})
    pressed = np.argsort(-found.actions, kind="stable")[:64]
    actions = _bars({known.name(int(a)): int(found.actions[a]) for a in pressed})
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(source)}</title><style>
body {{ font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 52rem;
  background: #12141a; color: #e2e6ee }}
td {{ padding: .1rem .6rem }} img {{ image-rendering: pixelated }}
b {{ display: inline-block; height: .8em; background: #f7b942 }}
</style></head><body>
<h1>{html.escape(known.game)}: {html.escape(source)}</h1>
<p>{count} of {of} episodes, {frames} frames.</p>
<h2>Mean frame</h2><img alt="mean of all frames" src="data:image/png;base64,{mean}">
<h2>Actions</h2>{f"<p>{html.escape(note)}</p>" if note else ""}{actions}
<h2>Lengths</h2>{lengths}
</body></html>
"""


def _bars(counts: dict[str, int]) -> str:
    total, most = max(1, sum(counts.values())), max(1, *counts.values())
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{n}</td><td>{100 * n / total:.1f} %</td>"
        f'<td><b style="width:{300 * n / most:.0f}px"></b></td></tr>'
        for name, n in counts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        write(parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=path_flag, default=shipped.data(), help="data folder (the embedded one)")
    add("--split", default="train", choices=shards.SPLITS, help="(%(default)s)")
    add("--shard", type=path_flag, help="show this one file instead")
    add("--n-episodes", type=int, default=3, help="episodes in the video (%(default)s)")
    add("--first", type=int, default=0, help="number of the first of them (%(default)s)")
    add("--count-episodes", type=int, default=500, help="episodes for the page's statistics (500)")
    add("--fps", type=int, default=FPS, help="frames a second of the video (%(default)s)")
    add("--scale", type=int, default=6, help="enlargement of the video's frames (%(default)s)")
    add("--output", type=path_flag, default=Path("preview.mp4"), help="or a .gif (%(default)s)")
    return parser


def write(args: argparse.Namespace) -> None:
    """Writes the video, the contact sheet and the page."""
    sheet, facts_page = (args.output.parent / f"{args.output.stem}{s}" for s in (".png", ".html"))
    _check(args, sheet, facts_page)
    if args.shard and not args.shard.is_file():
        raise UserError(f"there is no file {args.shard}")
    known = controls.read(args.shard.parent.parent if args.shard else args.data)
    paths = [args.shard] if args.shard else shards.find_shards(args.data, args.split)
    found = Episodes(paths, num_actions=known.num_values)
    if not 0 <= args.first < len(found):
        raise UserError(f"--first {args.first}: there are episodes 0…{len(found) - 1}")
    numbers = range(len(found))[args.first :][: args.n_episodes]

    total = int(found.lengths[numbers.start : numbers.stop].sum())
    images = tqdm(
        video_images(found, numbers, known, scale=args.scale), "rendering", total, unit=" frames"
    )
    video.write_video(args.output, images, fps=args.fps)
    video.write_png(sheet, contact_sheet(found, numbers, known))
    counted = np.linspace(0, len(found) - 1, min(len(found), args.count_episodes)).astype(int)
    source = str(args.shard or args.data / args.split)
    note = inferred_actions.note(args.shard.parent.parent if args.shard else args.data)
    counts = facts(found, counted.tolist(), known)
    html_page = page(counts, known, source=source, of=len(found), note=note)
    with files.written_whole(facts_page) as temporary:
        temporary.write_text(html_page, encoding="utf-8", errors="backslashreplace")
    print(f"{args.output}, {sheet}, {facts_page}")
    if note:
        print(note)


def _check(args: argparse.Namespace, sheet: Path, facts_page: Path) -> None:
    """Raises `UserError` for invalid numbers and files before frames are rendered."""
    for flag in ("n_episodes", "count_episodes", "fps", "scale"):
        if (value := getattr(args, flag)) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be 1 or more")
    files.check_outputs(
        ("--output", args.output, video.SUFFIXES),
        ("the contact sheet", sheet, (video.PNG_SUFFIX,)),
        ("the page", facts_page, (".html",)),
    )


if __name__ == "__main__":
    main()
