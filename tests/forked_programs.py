"""Several commands, each in its own process, with one import of the libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Calls the `main` of each command's module in a fork of this process.
_PARENT = """
import importlib, json, os, sys
from cwm_jax.programs import train
for number, (name, *words) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for stream, end in (1, "out"), (2, "err"):
            file = os.open(f"{sys.argv[2]}/{number}.{end}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
        sys.argv = [name, *words]
        importlib.import_module(name).main()
        sys.exit()
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_each(
    commands: Sequence[Sequence[str]], folder: Path, *, cwd: Path = ROOT, **environment: str
) -> list[Ended]:
    """Runs commands one after the other.

    Args:
        commands: the module and the words of each.
        folder: gets what they print.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, json.dumps(commands), str(folder)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    codes = map(int, done.stdout.split())
    printed = lambda i, end: (folder / f"{i}.{end}").read_text()
    return [Ended(code, printed(i, "out"), printed(i, "err")) for i, code in enumerate(codes)]
