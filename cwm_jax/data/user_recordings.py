"""Users' recordings of any game: videos or folders of pictures, and action lists.

A recording is `NAME.mp4` (or another video) or a folder `NAME/` of PNGs, with its actions next to
it in a list (`action_lists`), one for each frame: what was pressed while that frame was shown.
Hidden files, and those that desktops and network drives create, are skipped.
"""

import dataclasses
import functools
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cwm_jax import controls, files
from cwm_jax.coinrun import IMAGE_SIZE
from cwm_jax.controls import Controls
from cwm_jax.data import action_lists, pictures
from cwm_jax.errors import UserError, echo

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
FITS = ("stretch", "crop", "pad")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One video, or one folder of pictures, and the file of its actions."""

    name: str
    frames: Path
    actions: Path | None  # None: they will be inferred


def read_key_map(path: Path) -> Controls:
    """A game's controls from a TOML file: `game`, `action_encoding`, and `[[actions]]`.

    Raises:
        UserError: there is no such file, or a field is wrong; the message names it.
    """
    try:
        fields = tomllib.loads(files.read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the key map {path}: {error}") from None
    return controls.from_json(fields, path)


def find(folder: Path, *, with_actions: bool = True) -> list[Recording]:
    """The recordings of a folder by name.

    Raises:
        UserError: there are none, or one lacks its actions or has two sets of them; or, if they
            must have none, one has actions.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    seen: dict[str, Path] = {}
    present = files.visible(folder)
    for path in present:
        is_video = path.suffix.lower() in VIDEOS and path.is_file()
        if is_video or (path.is_dir() and _pictures_in(path)):
            name = path.name if path.is_dir() else path.stem
            if name in seen:
                raise UserError(f"{seen[name]} and {path} are both the frames of {name!r}")
            seen[name] = path
    if not seen:
        raise UserError(f"{folder} contains no videos ({', '.join(VIDEOS)}) and no folders of PNGs")
    if not with_actions:
        return [_without_actions(name, path, present) for name, path in seen.items()]
    for path in present:
        is_list = path.suffix.lower() in action_lists.SUFFIXES and path.is_file()
        if is_list and not any(_same_name(path.stem, name) for name in seen):
            echo(
                f"warning: {path} belongs to no frames: there is no folder of PNGs of that name, "
                f"and no video ({', '.join(VIDEOS)})"
            )
    return [Recording(name, path, _actions_of(name, present)) for name, path in seen.items()]


def _without_actions(name: str, path: Path, present: Sequence[Path]) -> Recording:
    if lists := _lists_of(name, present):
        raise UserError(
            f"{path} has its actions in {lists[0]}: pack it without --infer-actions, or put the "
            "recordings without actions into a folder of their own"
        )
    return Recording(name, path, None)


def _lists_of(name: str, present: Sequence[Path]) -> list[Path]:
    lists = (path for path in present if path.suffix.lower() in action_lists.SUFFIXES)
    return [path for path in lists if _same_name(path.stem, name) and path.is_file()]


def _actions_of(name: str, present: Sequence[Path]) -> Path:
    found = _lists_of(name, present)
    if len(found) != 1:
        wanted = " or ".join(name + suffix for suffix in action_lists.SUFFIXES)
        raise UserError(
            f"{present[0].parent}: {name!r} needs its actions in {wanted}, and in one of them"
        )
    return found[0]


def _same_name(a: str, b: str) -> bool:
    """Whether two names are equal in Unicode's NFC: macOS decomposes accented letters."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def _pictures_in(folder: Path) -> list[Path]:
    return [path for path in files.visible(folder) if _is_png(path)]


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png" and path.is_file()


def read_actions(path: Path, known: Controls) -> np.ndarray:
    """The actions of a recording, int32 [T]; buttons as bits. Errors as in `action_lists.read`."""
    return action_lists.read(path, known)


@dataclasses.dataclass
class Counter:
    """Counts frames as they are read."""

    frames: int = 0


def read_frames(
    path: Path, *, fit: str, every: int, counter: Counter | None = None
) -> Iterator[np.ndarray]:
    """Every `every`-th frame of a recording as viewers show it, uint8 [64, 64, 3].

    Args:
        fit: "stretch" both sides to 64; "crop" the longer side; or "pad" the shorter with black.
        counter: counts all frames, also those that are skipped.

    Raises:
        UserError: a video or picture cannot be read, or the order of pictures is unknown.
    """
    try:
        for number, picture in enumerate(_pictures(path)):
            if counter is not None:
                counter.frames += 1
            if number % every == 0:
                yield np.asarray(fitted(picture(), fit))
    except pictures.VIDEO_ERRORS as error:
        raise UserError(f"cannot read frames from {path}: {error}") from None


def _pictures(path: Path) -> Iterator[Callable[[], Image.Image]]:
    """Functions that convert each picture, so that skipped ones cost no conversion."""
    if not path.is_dir():
        return pictures.video_frames(path)
    found = pictures.in_order(_pictures_in(path))
    return (functools.partial(_read_png, png) for png in found)


def _read_png(path: Path) -> Image.Image:
    try:
        return pictures.read_picture(path)
    except pictures.PICTURE_ERRORS as error:
        raise UserError(f"cannot read a frame from {path}: {error}") from None


def fitted(picture: Image.Image, fit: str) -> Image.Image:
    """A picture of any size as 64×64; pixels are averaged, so that thin objects stay visible."""
    size, filter_ = (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX
    if picture.size == size:
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, size, filter_)
    if fit == "pad":
        return ImageOps.pad(picture, size, filter_)
    return picture.resize(size, filter_)


def split_of(count: int, *, val: float, test: float, seed: int) -> Sequence[str]:
    """A split for each of `count` pieces; val and test get at least one each.

    Raises:
        UserError: there are not enough pieces for three splits.
    """
    held = [max(1, round(count * share)) for share in (val, test)]
    if sum(held) >= count:
        raise UserError(
            f"{count} pieces are too few to assign {val:.0%} to val and {test:.0%} to test: "
            "lower --val and --test, or record more"
        )
    names = ["val"] * held[0] + ["test"] * held[1] + ["train"] * (count - sum(held))
    order = np.random.default_rng(seed).permutation(count)
    return [names[i] for i in np.argsort(order)]
