"""Programs in other processes: signals, time, and what happens meanwhile."""

import os
import signal

import pytest

from cwm_jax.runtime import subprograms


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_forwarded_to_the_running_program(name):
    number = getattr(signal, name)
    waits = "import os, signal, sys, time\n"
    waits += f"signal.signal(signal.{name}, lambda *_: sys.exit(75))\n"
    waits += f"os.kill({os.getpid()}, signal.{name})\ntime.sleep(60)"
    before = signal.getsignal(number)
    assert subprograms.run(["-c", waits]) == 75
    assert signal.getsignal(number) == before


def test_a_program_is_stopped_after_its_seconds():
    seen = []
    sleeps = ["-c", "import time; time.sleep(60)"]
    code = subprograms.run(sleeps, seconds=0.2, meanwhile=lambda: seen.append(1))
    assert code == subprograms.TOO_LONG
    assert seen


def test_a_killed_programs_status_is_the_shells():
    kills = ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert subprograms.status(subprograms.run(kills)) == 137
    assert subprograms.status(3) == 3
