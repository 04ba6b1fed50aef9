"""The time that a run has taken so far, over all its starts, and the minutes that it has."""

import time
from collections.abc import Callable


class Clock:
    """Counts seconds from its creation; the time in which a run does not run is not counted.

    Args:
        minutes: of the whole run; 0: no limit.
        decay_share: the last share of `minutes`, in which the learning rate falls linearly to 0.
        now: returns seconds, for tests.
    """

    def __init__(
        self, minutes: float, decay_share: float, *, now: Callable[[], float] = time.monotonic
    ):
        self._limit, self._decay_share = 60 * minutes, decay_share
        self._now, self._began = now, now()

    def resume(self, seconds: float) -> None:
        """Adds what earlier starts of the run took."""
        self._began -= seconds

    @property
    def seconds(self) -> float:
        """Of training so far, pauses for validation and compilation included."""
        return self._now() - self._began

    @property
    def share(self) -> float:
        """Of the minutes that have passed, 0…1; 0 without a limit."""
        return min(1.0, self.seconds / self._limit) if self._limit else 0.0

    @property
    def is_over(self) -> bool:
        return self.share == 1

    @property
    def rate(self) -> float:
        """By what the learning rate is multiplied, 0…1."""
        left = 1 - self.share
        return left / self._decay_share if left < self._decay_share else 1.0
