"""Packs recordings of any game into a data folder to train on.

    python -m cwm_jax.tools.pack recordings --keys keys.toml --output data/mygame

RECORDINGS contains videos (or folders of PNGs) and a list of actions for each:

    run1.mp4 run1.csv    a row for each frame: `action`, or 0 and 1 under each button's name
    run2/    run2.jsonl  {"action": "LEFT"} or {"buttons": ["A", "LEFT"]} for each frame
    run3.mkv run3.npz    `actions`: integers [T], or 0 and 1 [T, buttons]

KEYS.toml describes the actions:

    game = "my game"
    action_encoding = "one_hot"        # or "buttons": any combination of them, 8 at most
    [[actions]]
    name = "LEFT"
    keys = ["ArrowLeft"]               # as browsers name keys (KeyboardEvent.code)

Recordings of CoinRun without logged keys need neither lists nor a key map:

    python -m cwm_jax.tools.pack recordings --infer-actions data/coinrun --output data/watched

trains a probe on the given data folder to read actions from frames, labels the recordings, and
writes the accuracy of such labels to `metadata.json`.

Frames become 64×64. Each recording belongs to one split; if there are fewer than three, the end of
each is held out. If it is interrupted, run the same command again. Shards of an earlier call from
this folder are replaced once all new ones are written.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cwm_jax import controls, files
from cwm_jax.controls import Controls
from cwm_jax.data import inferred_actions, shards, user_recordings
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import Episode, decode, encode
from cwm_jax.data.user_recordings import Recording
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag

_NAME = "data_{}.array_record"  # hidden by a leading dot until all are written


_INFER = "recordings of CoinRun without actions: infer them from frames with a probe of DATA"


class Piece(NamedTuple):
    """One record to write: some frames of a recording."""

    split: str
    start: int  # counted in kept frames
    length: int


class Cut(NamedTuple):
    """How recordings are cut into records."""

    chunk: int
    min_chunk: int
    every: int
    fit: str
    val: float
    test: float
    seed: int


def plan(lengths: Sequence[int], cut: Cut) -> list[list[Piece]]:
    """The pieces of each recording by its number of kept frames, in order.

    Raises:
        UserError: there are too few chunks for three splits.
    """
    chunks = [list(_chunks(length, cut)) for length in lengths]
    usable = [number for number, mine in enumerate(chunks) if mine]
    if len(usable) < 3:
        return [_split_in_time(mine, cut) for mine in _enough(chunks, lengths, cut)]
    splits = user_recordings.split_of(len(usable), val=cut.val, test=cut.test, seed=cut.seed)
    split_of = dict(zip(usable, splits, strict=True))
    return [[Piece(split_of[n], *chunk) for chunk in mine] for n, mine in enumerate(chunks)]


def _enough(chunks: list, lengths: Sequence[int], cut: Cut) -> list:
    """The chunks; raises `UserError` if no recording has the three that splits need."""
    if max(map(len, chunks)) >= 3:
        return chunks
    longest = max(lengths)
    raise UserError(
        f"{len(lengths)} recordings, the longest of {longest} frames, are too few to split: "
        f"each gives records of --chunk {cut.chunk} frames, at least --min-chunk {cut.min_chunk}, "
        f"and train, val and test need one each. Add recordings, up to three or more, or set "
        f"--chunk and --min-chunk to {max(1, longest // 3)} or less"
    )


def _split_in_time(chunks: list, cut: Cut) -> list[Piece]:
    """The end of a recording is val and test; one of too few chunks is all train."""
    if len(chunks) < 3:
        return [Piece("train", *chunk) for chunk in chunks]
    splits = user_recordings.split_of(len(chunks), val=cut.val, test=cut.test, seed=0)
    ordered = sorted(splits, key=shards.SPLITS.index)
    return [Piece(split, *chunk) for split, chunk in zip(ordered, chunks, strict=True)]


def _chunks(length: int, cut: Cut) -> Iterator[tuple[int, int]]:
    for start in range(0, length, cut.chunk):
        size = min(cut.chunk, length - start)
        if size >= cut.min_chunk:
            yield start, size


class Labels(NamedTuple):
    """The actions of a recording."""

    kept: np.ndarray  # int32, of the kept frames
    listed: int  # in the recording's list; 0 if they were inferred


class Inference(NamedTuple):
    """Inference of missing actions from frames."""

    label: Callable[[Iterator[np.ndarray]], np.ndarray]  # see `action_labels.label`
    note: dict  # its entry in `metadata.json`


def pack(
    folder: Path,
    out: Path,
    known: Controls,
    cut: Cut,
    *,
    jobs: int,
    inference: Inference | None = None,
) -> dict[str, int]:
    """Packs every recording of `folder`, `jobs` at a time; returns the records of each split.

    Earlier shards stay until all is written, and are then replaced.

    Args:
        inference: labels recordings without actions; none may have any.

    Raises:
        UserError: a recording cannot be used; the message names the file and the error.
    """
    found = user_recordings.find(folder, with_actions=inference is None)
    if inference:
        labels = [_inferred(r, inference, cut) for r in tqdm(found, "inferring actions")]
    else:
        labels = [_listed(r, known, cut) for r in found]
    pieces = plan([len(one.kept) for one in labels], cut)
    _claim(out, folder, known)
    try:
        counts = _write_all(out, found, labels, pieces, known, cut, jobs)
        _replace_shards(out)
        _write_metadata(out, folder, known, inference)
    finally:
        _remove_hidden(out)
    return {split: counts[split] for split in shards.SPLITS}


def _listed(recording: Recording, known: Controls, cut: Cut) -> Labels:
    actions = user_recordings.read_actions(recording.actions, known)
    return Labels(actions[:: cut.every], len(actions))


def _inferred(recording: Recording, inference: Inference, cut: Cut) -> Labels:
    """The actions at all kept frames except the first and the last, which have none."""
    frames = user_recordings.read_frames(recording.frames, fit=cut.fit, every=cut.every)
    return Labels(inference.label(frames), 0)


def _write_all(out, found, labels, pieces, known, cut, jobs) -> collections.Counter[str]:
    """Writes every shard under its hidden name."""
    _remove_hidden(out)  # of a call that was killed
    counts: collections.Counter[str] = collections.Counter()
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(desc="packing", total=sum(map(len, pieces)), unit=" records") as bar,
    ):
        write = lambda *job: _write_recording(out, *job, known, cut, bar)
        for written in pool.map(write, range(len(found)), found, labels, pieces):
            counts.update(written)
    return counts


def _claim(out: Path, folder: Path, known: Controls) -> None:
    """Checks that a folder was packed from the same source, or is empty; marks an empty one."""
    path = out / controls.METADATA
    if path.is_file():
        content, source = files.read_json_object(path), _source(folder)
        if any(content.get(field, value) != value for field, value in source.items()):
            raise UserError(
                f"{out} contains other data, packed from another folder {content.get('source')!r}; "
                "choose a new folder, or remove this one"
            )
        if "source" not in content:
            raise UserError(f"{out} contains data that was not packed; choose a new folder")
    elif out.is_dir() and files.visible(out):
        raise UserError(f"{out} contains something that was not packed; choose a new folder")
    else:
        _write_metadata(out, folder, known)


def _source(folder: Path) -> dict[str, str]:
    """The identity of a source, also among those of the same name."""
    return {"source": folder.resolve().name, "source_path_sha256": files.place_digest(folder)}


def _write_metadata(
    out: Path, folder: Path, known: Controls, inference: Inference | None = None
) -> None:
    content = known.to_json() | _source(folder) | {"frame_shape": [64, 64, 3]}
    if inference:
        content[inferred_actions.KEY] = inference.note
    with files.written_whole(out / controls.METADATA) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _replace_shards(out: Path) -> None:
    """Removes the shards of an earlier call, and renames the new ones."""
    for split in shards.SPLITS:
        for old in (out / split).glob(_NAME.format("[0-9]*")):
            old.unlink()
        for new in (out / split).glob("." + _NAME.format("*")):
            new.rename(new.with_name(new.name.removeprefix(".")))


def _remove_hidden(out: Path) -> None:
    for split in shards.SPLITS:
        for left in (out / split).glob(".*.array_record"):
            left.unlink()


def _write_recording(out, number, recording: Recording, labels: Labels, pieces, known, cut, bar):
    """Writes one hidden shard for each split of a recording; returns its records by split."""
    frames, kept, at = _frames_of(recording, labels, cut), labels.kept, 0
    for split in dict.fromkeys(piece.split for piece in pieces):

        def records(split=split) -> Iterator[bytes]:
            nonlocal at
            for piece in (piece for piece in pieces if piece.split == split):
                for _ in range(piece.start - at):
                    next(frames)
                shown = np.stack([next(frames) for _ in range(piece.length)])
                at = piece.start + piece.length
                record = encode(Episode(shown, kept[piece.start : at]))
                decode(record, num_actions=known.num_values)  # as in training
                bar.update()
                yield record

        target = out / split / ("." + _NAME.format(f"{number:04d}"))
        with files.written_whole(target) as temporary:
            shards.write_shard(temporary, records())
    collections.deque(frames, maxlen=0)  # to its end, where the counts are compared
    return collections.Counter(piece.split for piece in pieces)


def _frames_of(recording: Recording, labels: Labels, cut: Cut) -> Iterator[np.ndarray]:
    """The frames of a recording's labels."""
    if recording.actions is not None:
        return _counted(recording, labels.listed, cut)
    frames = user_recordings.read_frames(recording.frames, fit=cut.fit, every=cut.every)
    return itertools.islice(frames, 1, 1 + len(labels.kept))


def _counted(recording: Recording, wanted: int, cut: Cut) -> Iterator[np.ndarray]:
    """The frames; raises an error if their number differs from that of the actions.

    One action fewer than frames is accepted: the last frame's action has no next frame.
    """
    seen = user_recordings.Counter()
    frames = user_recordings.read_frames(
        recording.frames, fit=cut.fit, every=cut.every, counter=seen
    )
    yield from itertools.islice(frames, len(range(0, wanted, cut.every)))
    for _ in frames:  # counts the others
        pass
    if not wanted <= seen.frames <= wanted + 1:
        raise UserError(
            f"{recording.frames} has {'more' if seen.frames > wanted else 'fewer'} frames than "
            f"{recording.actions} has actions ({wanted}): there must be one action a frame"
        )


def config_lines(known: Controls, out: Path) -> str:
    """The flags of training for this folder."""
    folder = shlex.quote(str(out))
    flags = f"--config.data.dir={folder} --config.model.num_actions={len(known.controls)}"
    if known.encoding != "one_hot":
        flags += f" --config.model.action_encoding={known.encoding}"
    if not known.is_procgen:
        flags += " --config.augment.mirror_share=0"  # of other actions none are known to exchange
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        for flag in ("chunk", "min_chunk", "every", "jobs"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be 1 or more")
        if args.seed < 0:
            raise UserError(f"--seed {args.seed}: must be 0 or more")
        if not (0 < args.val < 1 and 0 < args.test < 1 and args.val + args.test < 1):
            raise UserError(f"--val {args.val} --test {args.test}: shares above 0, below 1 in all")
        if (args.keys is None) == (args.infer_actions is None):
            raise UserError(
                "give one of the two: --keys, the key map of recordings with actions; or "
                "--infer-actions, a data folder of CoinRun to train the probe on"
            )
        inference = args.infer_actions and _inference(args.infer_actions)
        known = (
            user_recordings.read_key_map(args.keys) if args.keys else controls.procgen("coinrun")
        )
        cut = Cut(*(getattr(args, field) for field in Cut._fields))
        counts = pack(args.folder, args.output, known, cut, jobs=args.jobs, inference=inference)
        print(f"{args.output}: {', '.join(f'{n} records of {s}' for s, n in counts.items())}")
        if inference:
            print(inferred_actions.note(args.output))
        print(f"train with: {config_lines(known, args.output)}")


def _inference(folder: Path) -> Inference:
    from cwm_jax.evaluation import action_labels  # imports JAX, which packing does not need

    config = DataConfig(dir=str(folder))
    reader, measured = action_labels.trained(config)
    label = functools.partial(action_labels.label, reader)
    return Inference(label, action_labels.metadata(reader, config, measured))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "folder",
        type=path_flag,
        metavar="RECORDINGS",
        help="videos or folders of PNGs, and actions",
    )
    add("--keys", type=path_flag, help="the key map, a TOML file")
    add("--infer-actions", type=path_flag, metavar="DATA", help=_INFER)
    add("--output", type=path_flag, required=True, help="data folder to make")
    add("--fit", default="stretch", choices=user_recordings.FITS, help="to 64×64 (%(default)s)")
    add("--every", type=int, default=1, help="keep every N-th frame, such as 4 of 60 fps (1)")
    add("--chunk", type=int, default=160, help="frames in a record (%(default)s)")
    add("--min-chunk", type=int, default=32, help="shorter remainders are dropped (%(default)s)")
    add("--val", type=float, default=0.1, help="share of recordings for val (%(default)s)")
    add("--test", type=float, default=0.1, help="share of recordings for test (%(default)s)")
    add("--seed", type=int, default=0, help="of the choice of these recordings (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="recordings at a time (one a core)")
    return parser


if __name__ == "__main__":
    main()
