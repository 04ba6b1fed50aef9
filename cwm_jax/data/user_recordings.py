"""Recordings of any game, as people keep them: films or folders of pictures, and action lists.

A recording is `NAME.mp4` (or another film) or a folder `NAME/` of PNGs, with its actions beside
it, one for each frame: what was pressed while that frame was shown.

    NAME.csv    a column `action` (number or name), or a column of 0 and 1 for each button
    NAME.jsonl  {"action": 3}, {"action": "LEFT"} or {"buttons": ["A", "LEFT"]} a line
    NAME.npz    `actions`: whole numbers [T], or 0 and 1 [T, buttons]
"""

import csv
import dataclasses
import functools
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from cwm_jax import controls
from cwm_jax.coinrun import IMAGE_SIZE
from cwm_jax.controls import Controls
from cwm_jax.data import npz
from cwm_jax.errors import UserError

FILMS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_ACTIONS = (".csv", ".jsonl", ".npz")
FITS = ("stretch", "crop", "pad")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One film, or one folder of pictures, and the file of its actions."""

    name: str
    frames: Path
    actions: Path


def read_key_map(path: Path) -> Controls:
    """A game's controls from a TOML file: `game`, `action_encoding`, and `[[actions]]`.

    Raises:
        UserError: there is no such file, or it is wrong, with the field at fault.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the key map {path}: {error}") from None
    return controls.from_json(said, path)


def find(folder: Path) -> list[Recording]:
    """The recordings of a folder by name.

    Raises:
        UserError: there are none, or one lacks its actions or has two sets of them.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    seen: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in FILMS or (path.is_dir() and any(path.glob("*.png"))):
            name = path.name if path.is_dir() else path.stem
            if name in seen:
                raise UserError(f"{seen[name]} and {path} are both the frames of {name!r}")
            seen[name] = path
    if not seen:
        raise UserError(f"{folder} holds no films ({', '.join(FILMS)}) and no folders of PNGs")
    return [Recording(name, path, _actions_of(folder, name)) for name, path in seen.items()]


def _actions_of(folder: Path, name: str) -> Path:
    found = [folder / (name + suffix) for suffix in _ACTIONS]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        wanted = " or ".join(name + suffix for suffix in _ACTIONS)
        raise UserError(f"{folder}: {name!r} needs its actions in {wanted}, and in one of them")
    return found[0]


def read_actions(path: Path, known: Controls) -> np.ndarray:
    """The actions of a recording, int32 [T]; buttons as bits.

    Raises:
        UserError: naming the file, the line and the value that is wrong.
    """
    if path.suffix == ".npz":
        return _from_array(path, known)
    try:
        rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"cannot read actions from {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no actions")
    numbers = {control.name: i for i, control in enumerate(known.controls)}
    return np.array(
        [_action(row, numbers, known, f"{path}, line {line}") for line, row in rows], np.int32
    )


def _csv_rows(path: Path) -> list[tuple[int, Mapping[str, str]]]:
    with path.open(newline="") as file:
        return list(enumerate(csv.DictReader(file), start=2))


def _json_rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    rows = [(line, json.loads(text)) for line, text in lines if text.strip()]
    if wrong := [line for line, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"line {wrong[0]} is no JSON object")
    return rows


def _action(row: Mapping, numbers: dict[str, int], known: Controls, place: str) -> int:
    if known.encoding == "one_hot":
        return _single(row.get("action"), numbers, known, place)
    if "action" in row:
        return _number(row["action"], known, place)
    if "buttons" in row:
        held = row["buttons"]
        if not isinstance(held, list) or not set(map(str, held)) <= set(numbers):
            raise UserError(f"{place}: buttons are {held!r}; there are {', '.join(numbers)}")
        return sum(1 << numbers[button] for button in set(held))
    bits = 0
    for name, number in numbers.items():
        if row.get(name) not in ("0", "1", 0, 1, True, False):
            raise UserError(f"{place}: button {name!r} is {row.get(name)!r}; it must be 0 or 1")
        bits |= int(row[name]) << number
    return bits


def _single(value, numbers: dict[str, int], known: Controls, place: str) -> int:
    if isinstance(value, str) and value.strip() in numbers:
        return numbers[value.strip()]
    return _number(value, known, place)


def _number(value, known: Controls, place: str) -> int:
    try:
        number = -1 if isinstance(value, float) else int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < known.num_values:
        raise UserError(
            f"{place}: the action is {value!r}; it must be 0…{known.num_values - 1}, or one of "
            f"{', '.join(control.name for control in known.controls)}"
        )
    return number


def _from_array(path: Path, known: Controls) -> np.ndarray:
    actions = npz.read(path, ["actions"])["actions"]
    if actions.ndim == 2 and known.encoding == "buttons":
        if actions.shape[1] != len(known.controls) or not np.isin(actions, (0, 1)).all():
            raise UserError(
                f"{path}: actions are {actions.shape}; {len(known.controls)} buttons need 0 and 1 "
                f"in [T, {len(known.controls)}]"
            )
        actions = (actions.astype(np.int32) << np.arange(actions.shape[1])).sum(axis=1)
    if actions.ndim != 1 or actions.dtype.kind not in "iu" or not len(actions):
        raise UserError(f"{path}: actions are {actions.dtype} {actions.shape}, not whole [T]")
    if wrong := actions[(actions < 0) | (actions >= known.num_values)].tolist():
        raise UserError(f"{path}: action {wrong[0]}; they must be 0…{known.num_values - 1}")
    return actions.astype(np.int32)


def read_frames(path: Path, *, fit: str, every: int) -> Iterator[np.ndarray]:
    """Every `every`-th frame of a recording, uint8 [64, 64, 3].

    Args:
        fit: "stretch" both sides to 64; "crop" the longer side; or "pad" the shorter with black.

    Raises:
        UserError: a film or picture cannot be read.
    """
    try:
        for number, picture in enumerate(_pictures(path)):
            if number % every == 0:
                yield np.asarray(fitted(picture(), fit))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"cannot read frames from {path}: {error}") from None


def _pictures(path: Path) -> Iterator[Callable[[], Image.Image]]:
    """What makes each picture: those that are passed over cost no conversion."""
    if path.is_dir():
        for png in sorted(path.glob("*.png")):
            yield functools.partial(_read_png, png)
        return
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_image


def _read_png(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read a frame from {path}: {error}") from None


def fitted(picture: Image.Image, fit: str) -> Image.Image:
    """A picture of any size as 64×64; pixels are averaged, so that thin things stay."""
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
            f"{count} pieces are too few to share out {val:.0%} to val and {test:.0%} to test"
        )
    names = ["val"] * held[0] + ["test"] * held[1] + ["train"] * (count - sum(held))
    order = np.random.default_rng(seed).permutation(count)
    return [names[i] for i in np.argsort(order)]
