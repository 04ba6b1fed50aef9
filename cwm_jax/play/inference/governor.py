"""Chooses the DDIM steps of a frame and the frame rate of a player.

The governor chooses the most steps that reach the requested rate. Where a model has a card, which
lists the numbers of steps whose frames are good enough for play, a slow machine first lowers the
rate, down to `FLOOR` frames a second, before it uses a number of steps that is not listed.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

FLOOR = 5  # frames a second; below it, a higher rate matters more than better frames
_PATIENCE = 1.5  # seconds between changes, which are visible
_FULL, _ROOMY = 0.9, 0.85  # shares of a frame's time: above, fewer steps; below, more
_SPARE = 0.8  # the share of a frame's time at which a lowered rate rises again
_SMOOTHING = 0.2  # weight of the newest measurement
_FRAMES = 20  # measured before the rate or card is left, so that one slow frame has no effect
_OVERHEAD = 2  # forward passes per frame besides its steps: appending to two caches


class Governor:
    """Chooses the steps for the device, whose time the players share.

    Args:
        choices: numbers of steps, in any order.
        clock: returns seconds.
        playable: the steps that the model's card lists, at least one of the choices among them;
            None without a card: every choice is playable.
    """

    def __init__(
        self,
        choices: Sequence[int],
        clock: Callable[[], float],
        *,
        playable: Sequence[int] | None = None,
    ):
        self._listed = sorted(n for n in choices if playable is None or n in playable)
        self._has_card = playable is not None
        self._clock = clock
        self._step_seconds: float | None = None
        self._changed = clock()
        self._too_slow = (
            0  # consecutive frames at which no listed number of steps reached the floor
        )
        self.steps = self._listed[len(self._listed) // 2]  # until a step was measured

    def note(self, *, steps: int, seconds: float) -> None:
        """Records the seconds of a batch with so many steps."""
        each = seconds / (steps + _OVERHEAD)
        before = each if self._step_seconds is None else self._step_seconds
        self._step_seconds = before + _SMOOTHING * (each - before)

    def choose(self, fps: float, compiled: Sequence[int]) -> int:
        """The steps for the next frame at a requested rate of `fps`.

        Args:
            compiled: the choices whose programs are compiled.
        """
        if self._step_seconds is None:
            return self.steps
        listed = [n for n in compiled if n in self._listed]
        leaves_card = self._leaves_card(min(fps, FLOOR), listed)
        if self._clock() - self._changed < _PATIENCE:
            return self.steps
        best = self._best(min(fps, FLOOR), compiled) if leaves_card else self._best(fps, listed)
        if best != self.steps:
            self.steps, self._changed = best, self._clock()
        return self.steps

    def _best(self, fps: float, among: Sequence[int]) -> int:
        within = lambda share: [n for n in among if self._seconds(n) <= share / fps]
        least = min(among, default=self.steps)
        now = self.steps if self.steps in among or not self._has_card else least
        if self._seconds(now) > _FULL / fps:
            return max(within(_FULL), default=least)
        return max((n for n in within(_ROOMY) if n > now), default=now)

    def _leaves_card(self, floor: float, listed: Sequence[int]) -> bool:
        """Whether even the fewest listed steps have been too slow for this rate for long.

        Args:
            listed: the card's numbers of steps that are compiled.
        """
        if not self._has_card:
            return False
        share = _FULL if self.steps in self._listed else _ROOMY
        holds = any(self._seconds(n) <= share / floor for n in listed)
        self._too_slow = 0 if holds else self._too_slow + 1
        return self._too_slow >= _FRAMES

    def _seconds(self, steps: int) -> float:
        return self._step_seconds * (steps + _OVERHEAD)


class FrameRate:
    """The frame rate of one player: the requested one, or a lower one on a slow machine.

    Args:
        fps: the requested rate.
        lowers: False keeps the requested rate, even if frames are late.
    """

    def __init__(self, fps: int, *, lowers: bool):
        self.requested = self.fps = fps
        self._lowers = lowers
        self._steps: int | None = None  # of the last frame
        self._seconds: deque[float] = deque(maxlen=2 * _FRAMES)
        self._settled = False  # whether the rate was measured with these steps

    @property
    def lowered(self) -> bool:
        return self.fps < self.requested

    def note(self, seconds: float) -> None:
        """Records the seconds of the last frame, from its due time until it was sent."""
        self._seconds.append(seconds)

    def choose(self, requested: int, steps: int) -> int:
        """The rate for frames of so many steps at a requested rate."""
        if requested != self.requested:
            self.fps = min(requested, self.fps) if self.lowered else requested
            self.requested = requested
        if steps != self._steps:
            self._steps, self._settled = steps, False
            self._seconds.clear()
        if self._lowers and self._measured:
            before, self.fps = self.fps, self._best(self._capacity())
            self._settled = True
            if self.fps != before:
                self._seconds.clear()
        return self.fps

    @property
    def _measured(self) -> bool:
        frames = len(self._seconds)
        lasted = frames >= _FRAMES and sum(self._seconds) >= _PATIENCE
        return lasted or frames == self._seconds.maxlen

    def _capacity(self) -> float:
        """Frames a second, ignoring the slowest tenth, such as frames after a rewind."""
        usual = sorted(self._seconds)[: math.ceil(0.9 * len(self._seconds))]
        return len(usual) / max(sum(usual), 1e-6)

    def _best(self, capacity: float) -> int:
        """The rate for a device that generates `capacity` frames a second."""
        if self.fps > _FULL * capacity or not self._settled:
            return max(1, math.floor(min(self.requested, _FULL * capacity)))
        return max(self.fps, math.floor(min(self.requested, _SPARE * capacity)))
