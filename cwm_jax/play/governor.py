"""Picks how many DDIM steps a frame gets, so that frames come at the rate a person asked for."""

from collections.abc import Callable, Sequence

_PATIENCE = 1.5  # seconds between changes: a person sees each one
_FULL, _ROOMY = 0.9, 0.7  # shares of a frame's time: above one too slow, below the other room
_SMOOTHING = 0.2  # weight of the newest measurement
_OVERHEAD = 2  # passes a frame costs besides its steps: two caches take it in


class Governor:
    """One for the device, since the players share its time.

    Args:
        choices: numbers of steps, in any order.
        clock: seconds, rising.
    """

    def __init__(self, choices: Sequence[int], clock: Callable[[], float]):
        self._choices = sorted(choices)
        self._clock = clock
        self._pass_seconds: float | None = None
        self._changed = clock()
        self.steps = self._choices[len(self._choices) // 2]  # until it is known what a step costs

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
        if self._pass_seconds is None or self._clock() - self._changed < _PATIENCE:
            return self.steps
        within = lambda share: [n for n in compiled if self._seconds(n) <= share / fps]
        best = self.steps
        if self._seconds(self.steps) > _FULL / fps:
            best = max(within(_FULL), default=min(compiled, default=self.steps))
        elif roomy := [n for n in within(_ROOMY) if n > self.steps]:
            best = max(roomy)
        if best != self.steps:
            self.steps, self._changed = best, self._clock()
        return self.steps

    def _seconds(self, steps: int) -> float:
        return self._pass_seconds * (steps + _OVERHEAD)
