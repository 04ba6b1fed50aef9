"""The record of a session: each frame, the action that led into it, and its program."""

import tempfile
from collections.abc import Iterator

import numpy as np

from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.play.inference.engine import Program

_FRAME_BYTES = int(np.prod(FRAME_SHAPE))


class History:
    """Frames in an unnamed temporary file on disk; the rest in memory."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="cwm_jax_")  # noqa: SIM115
        self.actions: list[int] = []  # the action that led into each frame, −1 for none
        self.programs: list[Program | None] = []  # None: a given frame, of the prompt
        self.given = 0  # frames of the prompt

    def __len__(self) -> int:
        return len(self.actions)

    def append(self, frame_HWC: np.ndarray, action: int, program: Program | None) -> None:
        self._file.seek(len(self) * _FRAME_BYTES)
        self._file.write(frame_HWC.tobytes())
        self.actions.append(int(action))
        self.programs.append(program)
        self.given += program is None

    def cut(self, length: int) -> None:
        """Removes all frames from number `length` on, except those of the prompt."""
        length = max(length, self.given)
        del self.actions[length:], self.programs[length:]
        self._file.truncate(length * _FRAME_BYTES)

    def frame(self, number: int) -> np.ndarray:
        """uint8 [H, W, C]."""
        if not 0 <= number < len(self):
            raise IndexError(f"frame {number} of {len(self)}")
        self._file.seek(number * _FRAME_BYTES)
        return np.frombuffer(self._file.read(_FRAME_BYTES), np.uint8).reshape(FRAME_SHAPE)

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        return (self.frame(number) for number in range(start, stop))

    def close(self) -> None:
        self._file.close()
