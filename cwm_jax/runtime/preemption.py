"""Being asked to stop: by a scheduler's SIGTERM, by Ctrl-C, or by a terminal that closes."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from cwm_jax.errors import tell

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: no failure, start it again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Item = TypeVar("Item")


class Preempted(Exception):  # noqa: N818 (nothing went wrong)
    """A run was asked to stop and has stopped in good order; its message says where."""


class StopAsked(Exception):  # noqa: N818 (nothing went wrong)
    """Raised between the items of `Stop.until` once a stop is asked for."""


class Stop:
    """Notes the first SIGTERM, SIGINT or SIGHUP; a second SIGTERM or SIGINT ends it at once.

    A context manager, for the main thread; on leaving, signals mean what they meant before. A
    SIGHUP that the process was started to ignore, by `nohup`, stays ignored.

    Several processes of one run must stop after the same step. There the runtime of
    `jax.distributed` notes SIGTERM and chooses that step. A SIGHUP is handed on to it as SIGTERM;
    Ctrl-C is left as it is.
    """

    def __init__(self):
        self.signal: str | None = None
        self._together = jax.process_count() > 1
        self._before = {}

    def __enter__(self) -> "Stop":
        handlers = dict.fromkeys(_SIGNALS, self._note)
        if self._together:
            handlers = {signal.SIGHUP: lambda *_: signal.raise_signal(signal.SIGTERM)}
        for number, handler in handlers.items():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
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
        for each in self._before:  # the system itself ends the process, even amid a compilation
            signal.signal(each, signal.SIG_DFL)
        if signal.SIGHUP in self._before:  # a terminal that closes, and its shell, send one each
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        tell(
            f"\n{self.signal}: finishing this step, then saving. Once more stops at once.",
        )
