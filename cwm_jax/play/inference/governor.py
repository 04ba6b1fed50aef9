"""Picks the DDIM steps of a frame and the frames a second that a player gets.

The governor picks the most steps that hold the rate a person asked for. Where a model has a card,
which lists the numbers of steps whose frames are good enough to play with, the rate is lowered on a
slow machine, down to `FLOOR` frames a second, before a number that is not listed is picked.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

FLOOR = 5  # frames a second; below it, more frames are worth more than better ones
_PATIENCE = 1.5  # seconds between changes: a person sees each one
_FULL, _ROOMY = 0.9, 0.7  # shares of a frame's time: above one too slow, below the other room
_SPARE = 0.8  # the share of a frame's time at which a lowered rate rises again
_SMOOTHING = 0.2  # weight of the newest measurement
_FRAMES = 20  # measured before the rate changes or the card is left: one slow frame does neither
_OVERHEAD = 2  # passes a frame costs besides its steps: two caches take it in


class Governor:
    """One for the device, since the players share its time.

    Args:
        choices: numbers of steps, in any order.
        clock: seconds, rising.
        playable: the steps that the model's card lists, one of the choices among them; None where
            it has no card, and every choice is as good.
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
        self._pass_seconds: float | None = None
        self._changed = clock()
        self._too_slow = 0  # frames in a row at which no listed number of steps held the floor
        self.steps = self._listed[len(self._listed) // 2]  # until it is known what a step costs

    def note(self, *, steps: int, seconds: float) -> None:
        """A turn of the device, for one player or several, took so long with so many steps."""
        each = seconds / (steps + _OVERHEAD)
        before = each if self._pass_seconds is None else self._pass_seconds
        self._pass_seconds = before + _SMOOTHING * (each - before)

    def choose(self, fps: float, compiled: Sequence[int]) -> int:
        """The steps for the next frame where `fps` frames a second are wanted.

        Args:
            compiled: the choices that need not be waited for.
        """
        if self._pass_seconds is None:
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
        """Whether even the least listed steps have long been too slow for so many frames a second.

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
        return self._pass_seconds * (steps + _OVERHEAD)


class FrameRate:
    """Frames a second of one player: as many as were asked for, or fewer on a slow machine.

    Args:
        fps: what is asked for.
        lowers: False keeps the rate as it is asked for, however late frames come.
    """

    def __init__(self, fps: int, *, lowers: bool):
        self.asked = self.fps = fps
        self._lowers = lowers
        self._steps: int | None = None  # of the last frame
        self._seconds: deque[float] = deque(maxlen=2 * _FRAMES)
        self._settled = False  # whether the rate was measured with these steps

    @property
    def lowered(self) -> bool:
        return self.fps < self.asked

    def note(self, seconds: float) -> None:
        """The last frame took so long, from when it was due to when it was sent."""
        self._seconds.append(seconds)

    def choose(self, asked: int, steps: int) -> int:
        """The rate for frames of so many steps where `asked` frames a second are wanted."""
        if asked != self.asked:
            self.fps = min(asked, self.fps) if self.lowered else asked
            self.asked = asked
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
        """Frames a second without the slowest tenth, such as the frame after a rewind."""
        usual = sorted(self._seconds)[: math.ceil(0.9 * len(self._seconds))]
        return len(usual) / max(sum(usual), 1e-6)

    def _best(self, capacity: float) -> int:
        """The rate where the device generates `capacity` frames a second, one after the other."""
        if self.fps > _FULL * capacity or not self._settled:
            return max(1, math.floor(min(self.asked, _FULL * capacity)))
        return max(self.fps, math.floor(min(self.asked, _SPARE * capacity)))
