"""The messages between the page and the server.

In, as JSON text of at most 64 KiB: `{"do": NAME, …}`, see the methods `_do_…` of `Player`; as
bytes: a picture to start from. Out, as JSON text: `{"event": NAME, …}`; as bytes: a frame, see
`frame`; after it, where the page asked for `unsure`, its patches, see `unsure`; or after
`{"event": "branches", …}` the frames of what-if, see `branches`.
"""

import json
import struct
from collections.abc import Iterable

import numpy as np

from cwm_jax.errors import UserError
from cwm_jax.play.session.session import Session

MAX_TEXT = 64 << 10
# kind (1: frame), lanes, action, DDIM steps, window, number, total frames, time stamp of the key
_HEADER = struct.Struct("<BBhHHIId")
# kind (3: of which patches the model is unsure), rows, columns; then a byte for each patch
_PATCHES = struct.Struct("<BBB")
_FRAME, _BRANCHES, _UNSURE = 1, 2, 3


def frame(session: Session, frame_HWC: np.ndarray, stamp: float) -> bytes:
    """The session's current frame, after a header.

    Args:
        stamp: when the page sent the key that led to the frame, by its own clock; 0: none.
    """
    at, history = session.at, session.history
    steps, lanes = history.programs[at] or (0, 0)
    of_frame = lanes, history.actions[at], steps, session.window, at, len(history), stamp
    return _HEADER.pack(_FRAME, *of_frame) + frame_HWC.tobytes()


def unsure(patches_hw: np.ndarray) -> bytes:
    """How unsure the model is of each patch, in colours of 0…255."""
    values = np.clip(np.nan_to_num(patches_hw), 0, 255).astype(np.uint8)
    return _PATCHES.pack(_UNSURE, *values.shape) + values.tobytes()


def branches(frames: Iterable[np.ndarray]) -> bytes:
    """The frames of all branches of what-if, branch by branch."""
    return bytes([_BRANCHES]) + b"".join(one.tobytes() for one in frames)


def command(text: str) -> tuple[object, dict]:
    """The name of a command, which may be anything, and its fields.

    Raises:
        UserError: the text is too long or is no command.
    """
    if len(text) > MAX_TEXT:
        raise UserError(f"a message of {len(text):,} characters; at most {MAX_TEXT:,} are accepted")
    try:
        fields = json.loads(text)
        return fields.pop("do"), fields
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise UserError('that message is not valid: send JSON, {"do": NAME, …}') from None


def whole(fields: dict, name: str, low: int, high: int) -> int:
    """A field that must be a whole number; raises `UserError`."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be a whole number {low}…{high}")
    return value


def flag(fields: dict, name: str) -> bool:
    """A field that must be true or false; raises `UserError`."""
    value = fields.get(name)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be true or false")
    return value


def number(fields: dict, name: str) -> float:
    """A field that must be a number, 0 where it is missing; raises `UserError`."""
    value = fields.get(name, 0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e15:
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be a number")
    return float(value)
