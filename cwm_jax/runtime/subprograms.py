"""Runs programs of this package in other processes, which get the signals of this one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from cwm_jax import shipped
from cwm_jax.runtime import process_memory

TOO_LONG = 124  # exit code of a program that was stopped after its seconds, as of `timeout`
_GRACE = 30  # seconds to end after SIGTERM


def environment(**changes: str) -> dict[str, str]:
    """Environment of programs: they find this package, and use one GPU."""
    path = os.pathsep.join(filter(None, (str(shipped.root()), os.environ.get("PYTHONPATH"))))
    ours = {
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_CLIENT_MEM_FRACTION": str(process_memory.SHARE_OF_GPU),
    }
    return {**ours, **os.environ, "PYTHONPATH": path, **changes}


def run(
    words: Sequence[str],
    *,
    seconds: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    **changes: str,
) -> int:
    """Runs Python with these arguments and returns its exit code.

    SIGTERM is forwarded. A terminal sends Ctrl-C and SIGHUP to both processes.

    Args:
        seconds: after so many it is stopped, and the code is `TOO_LONG`.
        meanwhile: called about once a second.
        changes: of the environment.
    """
    program = subprocess.Popen([sys.executable, *words], env=environment(**changes))
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: program.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(
            signal.SIGHUP, lambda *_: program.send_signal(signal.SIGHUP)
        )
    end = None if seconds is None else time.monotonic() + seconds
    try:
        while end is None or time.monotonic() < end:
            try:
                return program.wait(timeout=1 if end is None else min(1, seconds))
            except subprocess.TimeoutExpired:
                meanwhile()
        stop(program)
        return TOO_LONG
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(program: subprocess.Popen) -> None:
    """Ends a program: SIGTERM and, if it goes on for half a minute, SIGKILL."""
    program.terminate()
    try:
        program.wait(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def status(code: int) -> int:
    """The exit status that a shell reports for an exit code of `run`: 128 + N for signal N."""
    return code if code >= 0 else 128 - code
