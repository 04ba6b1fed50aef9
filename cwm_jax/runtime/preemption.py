"""Being asked to stop: by a scheduler's SIGTERM, or by Ctrl-C."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from cwm_jax.errors import tell

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: no failure, start it again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Item = TypeVar("Item")


class Preempted(Exception):  # noqa: N818 (nothing went wrong)
    """A run was asked to stop and has stopped in good order; its message says where."""


class StopAsked(Exception):  # noqa: N818 (nothing went wrong)
    """Raised between the items of `Stop.until` once a stop is asked for."""


class Stop:
    """Notes the first SIGTERM or SIGINT; a second one ends the process at once.

    A context manager, for the main thread; on leaving, signals mean what they meant before.

    Several processes of one run must stop after the same step. There the runtime of
    `jax.distributed` notes SIGTERM and chooses that step; Ctrl-C is left as it is.
    """

    def __init__(self):
        self.signal: str | None = None
        self._together = jax.process_count() > 1
        self._before = {}

    def __enter__(self) -> "Stop":
        for number in () if self._together else _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; to be asked once after each step, by every process."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes items on; raises `StopAsked` between them, except where processes must agree."""
        for item in items:
            if self.signal and not self._together:
                raise StopAsked
            yield item

    def _note(self, number: int, _) -> None:
        self.signal = signal.Signals(number).name
        for each in _SIGNALS:  # the system itself ends the process, even amid a long compilation
            signal.signal(each, signal.SIG_DFL)
        tell(
            f"\n{self.signal}: finishing this step, then saving. Once more stops at once.",
        )
