"""Checks of arguments that users pass from Python; each error names the argument and its value."""

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.errors import UserError

NUM_SEEDS = 2**32
_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def integer(name: str, value: Any, low: int, high: int | None = None, note: str = "") -> int:
    """`value` as an int. A bool is not one, and neither is 2.0.

    Args:
        name: of the argument.
        value: of any type.
        low, high: the range, ends included; without `high` it has no upper end.
        note: what the range is, for the message.

    Raises:
        UserError: it is not an integer in `low`…`high`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        valid = f"{low} or more" if high is None else f"{low}…{high}"
        note = f" ({note})" if note else ""
        raise UserError(f"{name}={shown(value)}: must be an integer, {valid}{note}")
    return number


def check_path(name: str, value: Any, wanted: str) -> None:
    """Raises a UserError for a value that is neither text, nor a path, nor None."""
    if not isinstance(value, str | os.PathLike | None):
        raise UserError(f"{name}={shown(value)}: must be {wanted}")


def array(name: str, value: Any, wanted: str) -> np.ndarray:
    """`value` as an array.

    Raises:
        UserError: it is none, such as lists of different lengths; it is to be `wanted`.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={shown(value)}: must be {wanted}") from None


def integers(name: str, value: Any, wanted: str) -> np.ndarray:
    """`value` as an array of integers of any type.

    Raises:
        UserError: its values are not integers.
    """
    found = array(name, value, wanted)
    if not found.size:
        return found.astype(int)  # NumPy makes floats of an empty list
    if not np.issubdtype(found.dtype, np.integer):
        raise UserError(f"{name}={shown(value)}: must be {wanted}")
    return found


def booleans(name: str, value: Any, wanted: str) -> np.ndarray:
    """`value` as an array of bools.

    Raises:
        UserError: its values are not bools.
    """
    found = array(name, value, wanted)
    if found.dtype != bool:
        raise UserError(f"{name}={shown(value)}: must be {wanted}")
    return found


def seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """The seed of each of B worlds: seed + i, or those given.

    Raises:
        UserError: one is not an integer 0…2³² − 1, or they are not B.
    """
    found = array("seed", seed, f"an integer, or {batch} integers")
    if found.ndim == 0:
        first = integer("seed", seed, 0, NUM_SEEDS - 1)
        return [(first + i) % NUM_SEEDS for i in range(batch)]
    if found.ndim != 1 or len(found) != batch:
        raise UserError(
            f"seed={shown(seed)}: {len(found)} seeds for {batch} worlds; expected one for each, or "
            "one number"
        )
    return [integer(f"seed[{i}]", one, 0, NUM_SEEDS - 1) for i, one in enumerate(seed)]


def prompt_frames(frames: Any, frame_shape: tuple[int, int, int]) -> np.ndarray:
    """A prompt's frames as they are given, uint8: [H, W, C], [P, H, W, C] or [B, P, H, W, C].

    Raises:
        UserError: their type or shape is another.
    """
    size = ", ".join(map(str, frame_shape))
    wanted = f"uint8 [{size}], [P, {size}] or [B, P, {size}]"
    found = array("frames", frames, wanted)
    fits = found.ndim in (3, 4, 5) and found.shape[-3:] == frame_shape
    if found.dtype != np.uint8 or not fits:
        raise UserError(f"frames are {found.dtype} {found.shape}: must be {wanted}")
    return found


def prompt(frames: np.ndarray, actions: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt for each world, [B, P, H, W, C], and its actions, [B, P].

    Args:
        frames: as `prompt_frames` returns them.
        actions: [P] or [B, P]; None for a single frame.

    Raises:
        UserError: the actions are missing, or not one for each frame.
    """
    count = 1 if frames.ndim == 3 else frames.shape[-4]
    frames_BPHWC = np.broadcast_to(
        frames if frames.ndim > 3 else frames[None], (batch, count, *frames.shape[-3:])
    )
    if actions is None and count > 1:
        raise UserError(
            f"{count} prompt frames without actions: expected the action that led into each (−1 "
            "for the first)"
        )
    if actions is None:
        return frames_BPHWC, np.full((batch, 1), NO_ACTION)
    wanted = f"integers [{count}] or [{batch}, {count}], the action that led into each frame"
    found = integers("actions", actions, wanted)
    if found.shape not in ((count,), (batch, count)):
        raise UserError(
            f"actions of shape {found.shape} for {count} prompt frames: must be {wanted} (−1 for "
            "the first)"
        )
    return frames_BPHWC, np.broadcast_to(found, (batch, count))
