"""Users see messages, never a traceback."""

import atexit
import io
import os
import shlex
import subprocess
import sys

import pytest
from forked_programs import run_each

from cwm_jax import errors
from cwm_jax.errors import UserError, echo, shown_to_user


@pytest.mark.parametrize(
    ("raised", "printed", "code"),
    [
        (UserError("runs/x is no folder"), "error: runs/x is no folder\n", 2),
        (KeyboardInterrupt(), "\ninterrupted\n", 130),
    ],
)
def test_a_mistake_and_ctrl_c_end_a_program_with_one_message(raised, printed, code, capsys):
    with pytest.raises(SystemExit) as ended, shown_to_user():
        raise raised
    atexit.unregister(errors._end_at_once)  # this process goes on
    assert ended.value.code == code
    assert capsys.readouterr().err == printed


_COMPILING = """
import gc, os, signal, threading, jax, jax.numpy as jnp
from cwm_jax.errors import shown_to_user
def slow(x):
    for size in range(64, 264):
        x = jnp.sort(x @ jnp.ones((size, size + 1)), axis=0)
    return x
gc.disable()  # a signal during JAX's callback of the garbage collector is lost
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
with shown_to_user():
    lowered = jax.jit(slow).lower(jnp.ones((64, 64)))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    print("compiling", flush=True)
    lowered.compile()
    print("compiled")
"""


def test_ctrl_c_while_a_program_is_compiled():
    done = subprocess.run(
        [sys.executable, "-c", _COMPILING],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "compiling\n", "it was too quick"
    assert (done.stderr, done.returncode) == ("\ninterrupted\n", 130)


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), shown_to_user():
        raise ZeroDivisionError


_PROGRAM = """
import sys, warnings
from tqdm import tqdm
from cwm_jax.errors import shown_to_user, echo
with shown_to_user():
    for _ in tqdm(range(3), desc="generating"):
        print("3 frames → a.mp4", flush=True)
    echo("„done“")
    warnings.warn("sehr schön")
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        assert file.fileno() > 2, "a library that prints would write into this file"
        print("words", file=sys.stderr, flush=True)
        file.write("work")
"""


def _run(tmp_path, shell: str, **environment: str) -> str:
    """Runs `_PROGRAM` in the `shell` command; checks its work and returns its output."""
    words = [sys.executable, "-c", _PROGRAM, str(tmp_path / "work")]
    command = shell.format(" ".join(map(shlex.quote, words)))
    run = ["bash", "-c", f"set -o pipefail; {command}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    done = subprocess.run(run, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work").read_text() == "work"
    return done.stdout.decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_a_terminal_lacks_are_escaped(encoding, tmp_path):
    assert r"3 frames \u2192 a.mp4" in _run(tmp_path, "{}", PYTHONIOENCODING=encoding)


@pytest.mark.parametrize(
    "shell",
    ["{} | true", "{} 2>&1 | true", "{} >&-", "{} 2>&-", "{} <&- >&- 2>&-", "{} > /dev/full 2>&1"],
)
def test_a_stream_that_cannot_be_written_does_not_end_the_work(shell, tmp_path):
    _run(tmp_path, shell)


def test_the_programs_help_is_printed_in_ascii(tmp_path):
    modules = ("programs.train", "programs.sample", "tools.pack")
    commands = [[f"cwm_jax.{module}", "--help"] for module in modules]
    for done in run_each(commands, tmp_path, PYTHONIOENCODING="ascii"):
        assert "UnicodeEncodeError" not in done.stderr
        assert "--" in done.stdout


def test_messages_are_printed_also_outside_of_a_program(capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    echo("a → b", file=narrow)
    assert narrow.buffer.getvalue() == b"a \\u2192 b\n"
