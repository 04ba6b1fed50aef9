"""The training time of a run so far, over all its starts, and its limit in minutes."""

import time
from collections.abc import Callable


class Clock:
    """Counts seconds from its creation; time between starts of a run is not counted.

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
        """Adds the seconds of earlier starts of the run."""
        self._began -= seconds

    @property
    def seconds(self) -> float:
        """Training time so far, including validation and compilation."""
        return self._now() - self._began

    @property
    def share(self) -> float:
        """The share of the minutes that has passed, 0…1; 0 without a limit."""
        return min(1.0, self.seconds / self._limit) if self._limit else 0.0

    @property
    def is_over(self) -> bool:
        return self.share == 1

    @property
    def rate(self) -> float:
        """The factor of the learning rate, 0…1."""
        left = 1 - self.share
        return left / self._decay_share if left < self._decay_share else 1.0
