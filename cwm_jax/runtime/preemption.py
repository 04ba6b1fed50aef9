"""Stop requests: a scheduler's SIGTERM, Ctrl-C, or a terminal that closes."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from cwm_jax.errors import echo

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not a failure; start the program again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Item = TypeVar("Item")


class Preempted(Exception):  # noqa: N818 (nothing went wrong)
    """A run received a stop request and ended cleanly; the message names the step."""


class StopRequested(Exception):  # noqa: N818 (nothing went wrong)
    """Raised between the items of `Stop.until` after a stop request."""


class Stop:
    """Records the first SIGTERM, SIGINT or SIGHUP; a second SIGTERM or SIGINT ends the process.

    A context manager for the main thread, which restores the signal handlers on exit. A SIGHUP
    that `nohup` ignores stays ignored.

    Several processes of one run must stop after the same step. There the runtime of
    `jax.distributed` receives SIGTERM and chooses that step. A SIGHUP is forwarded to it as
    SIGTERM; Ctrl-C keeps its handler.
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

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; every process calls it once after each step."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items; raises `StopRequested` between them in a run of one process."""
        for item in items:
            if self.signal and not self._together:
                raise StopRequested
            yield item

    def _note(self, number: int, _) -> None:
        self.signal = signal.Signals(number).name
        for each in self._before:  # then the system ends the process, even during compilation
            signal.signal(each, signal.SIG_DFL)
        if signal.SIGHUP in self._before:  # a closing terminal and its shell send one each
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        echo(
            f"\n{self.signal}: finishing this step, then saving. Send it again to stop at once.",
        )
