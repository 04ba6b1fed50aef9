"""Signals: the first is recorded, the second ends the process; and changed settings on resume."""

import os
import signal
import subprocess
import sys

import pytest

from cwm_jax.errors import UserError
from cwm_jax.experiment import resume_check
from cwm_jax.runtime.preemption import Stop, StopRequested

TWO_SIGNALS = """
import os, signal, sys, time
from cwm_jax.runtime.preemption import Stop
with Stop() as stop:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    assert stop.requested(1) and stop.signal == sys.argv[1]
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    time.sleep(20)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_recorded_and_handlers_are_restored(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested(1)
        assert list(stop.until(range(3))) == [0, 1, 2]
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.signal == name
        with pytest.raises(StopRequested):
            list(stop.until(range(3)))
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process():
    words = [sys.executable, "-c", TWO_SIGNALS, "SIGTERM", "SIGTERM"]
    ended = subprocess.run(words, timeout=100, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert "Send it again to stop at once" in ended.stderr


def test_the_two_signals_of_a_closed_terminal_do_not_prevent_saving():
    program = TWO_SIGNALS.replace("time.sleep(20)", "print('saved')")
    words = [sys.executable, "-c", program, "SIGHUP", "SIGHUP"]
    ended = subprocess.run(words, timeout=100, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "saved\n"), ended.stderr


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_with_several_processes_a_hangup_becomes_a_sigterm(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Stop():
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


OLD = {"lr": 1e-3, "seed": 0, "ema_decay": 0.9, "model": {"depth": 2, "dtype": "float32"}}


def test_allowed_changes_are_reported():
    now = OLD | {"lr": 2e-3, "model": {"depth": 2, "dtype": "bfloat16"}, "new": 1}
    assert resume_check.compare(OLD, OLD) == []
    assert resume_check.compare(OLD, now) == [
        "config.model.dtype='bfloat16', was 'float32'",
        "config.new=1, was None",
        "config.optimizer.lr=0.002, was 0.001",
    ]


def test_every_setting_that_must_match_is_named():
    now = {"lr": 2e-3, "seed": 1, "ema_decay": 0.0, "model": {"depth": 3, "dtype": "float32"}}
    with pytest.raises(UserError) as raised:
        resume_check.compare(OLD, now)
    for line in ("seed=1, was 0", "optimizer.ema_decay=0.0, was 0.9", "model.depth=3, was 2"):
        assert f"config.{line}" in str(raised.value)
    assert "optimizer.lr" not in str(raised.value)
    assert resume_check.compare(OLD, OLD | {"ema_decay": 0.99})


@pytest.mark.parametrize("ending", ["SystemExit(75)", "errors.UserError('no')"])
def test_a_full_disk_does_not_change_the_exit_code(ending):
    program = (
        "from cwm_jax import errors\nwith errors.shown_to_user():\n"
        f"    print('a word'); errors.echo('another'); raise {ending}"
    )
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", program]
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # otherwise each print fails separately
        run = subprocess.run(words, stdout=full, stderr=full, env=buffered, check=False)
    assert run.returncode == (75 if "75" in ending else 2)
