"""Converts between dataset records and episodes, safely; describes faults of bad records.

A record is a pickled dict, as in the public dataset `p-doom/coinrun-dataset`:
`raw_video` (the bytes of uint8 [T, 64, 64, 3]), `sequence_length` (T) and `actions` (int [T]).
Two more are read on request: `rewards` (float [T], what action i earned) and `done`
(bool [T], whether action i ended the episode). Other keys are ignored.
"""

import dataclasses
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data import safe_pickle
from cwm_jax.errors import UserError

KEYS = ("raw_video", "sequence_length", "actions")
OUTCOME_KEYS = ("rewards", "done")
FRAME_BYTES = math.prod(FRAME_SHAPE)


class BadRecord(UserError):  # noqa: N818 (named after the record)
    """A record that is no episode: `reason`, and its place once that is known."""

    def __init__(self, reason: str, shard: Path | None = None, index: int | None = None):
        super().__init__(reason)
        self.reason, self.shard, self.index = reason, shard, index

    def __str__(self) -> str:
        where = "" if self.shard is None else f"{self.shard}, record {self.index}: "
        return where + self.reason

    def at(self, shard: Path, index: int) -> "BadRecord":
        """The same error, with its place (`index` counts the records of `shard` from 0)."""
        return BadRecord(self.reason, shard, index)


class Outcomes(NamedTuple):
    """The outcomes of an episode's actions."""

    rewards: np.ndarray  # float32 [T], what action i earned
    done: np.ndarray  # bool [T], whether action i ended the episode: only the last can


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """T frames of one game and the action pressed at each; `actions[i]` leads to frame i + 1."""

    frames: np.ndarray  # uint8 [T, 64, 64, 3]
    actions: np.ndarray  # int32 [T], 0…14
    outcomes: Outcomes | None = None  # None if not requested, or not recorded

    def __post_init__(self):
        frames, actions = self.frames, self.actions
        if frames.dtype != np.uint8 or frames.shape[1:] != FRAME_SHAPE or not len(frames):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [T, 64, 64, 3]")
        if actions.dtype != np.int32 or actions.shape != frames.shape[:1]:
            raise ValueError(f"actions are {actions.dtype} {actions.shape}, not int32 [T]")

    def __len__(self) -> int:
        return len(self.frames)


def decode(record: bytes, *, num_actions: int = NUM_ACTIONS, outcomes: bool = False) -> Episode:
    """The episode in `record`; its frames are a read-only view onto the record's own bytes.

    Actions must lie in 0…num_actions-1. With `outcomes`, rewards and the episode's end are read
    where the record has both. Raises `BadRecord` with the reason for anything that is not an
    episode, and runs nothing that a record may name.
    """
    try:
        fields = safe_pickle.loads(record)
    except safe_pickle.RefusedError as refused:
        raise BadRecord(str(refused)) from None
    if not isinstance(fields, dict):
        raise BadRecord(f"it is a {type(fields).__name__}, not a dict with {', '.join(KEYS)}")
    if missing := [key for key in KEYS if key not in fields]:
        raise BadRecord(f"it lacks {', '.join(missing)}; a record has {', '.join(KEYS)}")
    length = _length(fields["sequence_length"])
    frames = _frames(fields["raw_video"], length)
    actions = _actions(fields["actions"], length, num_actions)
    has_both = outcomes and all(key in fields for key in OUTCOME_KEYS)
    return Episode(frames, actions, _outcomes(fields, length) if has_both else None)


def encode(episode: Episode, extra: Mapping[str, int | np.ndarray] | None = None) -> bytes:
    """The record of `episode`, readable by `decode` and by `pickle.loads` under NumPy 1 and 2.

    `extra` adds fields that `decode` ignores: integers, and arrays of plain numbers.
    """
    fields = {
        "raw_video": episode.frames.tobytes(),
        "sequence_length": len(episode),
        "actions": episode.actions,
        **(extra or {}),
    }
    # NumPy 2 reads the module name of NumPy 1, but not the other way round. Protocol 3 writes
    # names as lines of text and no offsets, so the name can be replaced; it stands after the
    # video, and the actions after it cannot spell it.
    record = pickle.dumps(fields, protocol=3)
    before, name, after = record.rpartition(b"cnumpy._core.multiarray\n")
    return b"".join((before, b"cnumpy.core.multiarray\n" if name else b"", after))


def _length(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadRecord(f"its sequence_length is a {type(value).__name__}, not an integer")
    if value < 1:
        raise BadRecord(f"its sequence_length is {value}; an episode has at least 1 frame")
    return int(value)


def _frames(video: object, length: int) -> np.ndarray:
    if not isinstance(video, memoryview):
        raise BadRecord(f"its raw_video is a {type(video).__name__}, not bytes")
    expected = length * FRAME_BYTES
    if len(video) != expected:
        raise BadRecord(
            f"its raw_video has {len(video)} bytes; {length} frames of 64×64×3 have {expected}"
        )
    return np.frombuffer(video, np.uint8).reshape(length, *FRAME_SHAPE)


def _actions(actions: object, length: int, num_actions: int) -> np.ndarray:
    if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iu":
        kind = actions.dtype if isinstance(actions, np.ndarray) else type(actions).__name__
        raise BadRecord(f"its actions are {kind}, not an array of integers")
    if actions.shape != (length,):
        raise BadRecord(f"its actions have shape {actions.shape}; {length} frames need ({length},)")
    (wrong,) = np.nonzero((actions < 0) | (actions >= num_actions))
    if wrong.size:
        frame = int(wrong[0])
        raise BadRecord(
            f"its action at frame {frame} is {actions[frame]}; actions are 0…{num_actions - 1}"
        )
    return actions.astype(np.int32)


def _outcomes(fields: Mapping[str, object], length: int) -> Outcomes:
    rewards, done = (fields[key] for key in OUTCOME_KEYS)
    for key, value, kinds in (("rewards", rewards, "fiu"), ("done", done, "b")):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            wanted = "booleans" if kinds == "b" else "numbers"
            raise BadRecord(f"its {key} are {kind}, not an array of {wanted}")
        if value.shape != (length,):
            raise BadRecord(f"its {key} have shape {value.shape}; {length} frames need ({length},)")
    if not np.isfinite(rewards).all():
        raise BadRecord("its rewards are not all finite numbers")
    if done[:-1].any():
        raise BadRecord(
            f"its done is true at frame {int(done.argmax())} of {length}; an episode ends with its "
            "last frame alone"
        )
    return Outcomes(rewards.astype(np.float32), done.astype(bool))
