"""Several commands of a program, each in its own process, with one import of its libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Imports a module, then calls its `main` in a fork for each list of words.
_PARENT = """
import importlib, json, os, sys
module = importlib.import_module(sys.argv[1])
for number, words in enumerate(json.loads(sys.argv[2])):
    child = os.fork()
    if not child:
        for stream, end in (1, "out"), (2, "err"):
            file = os.open(f"{sys.argv[3]}/{number}.{end}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
        sys.argv = [sys.argv[1], *words]
        module.main()
        sys.exit()
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status))
"""


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_each(
    module: str, commands: Sequence[Sequence[str]], folder: Path, **environment: str
) -> list[Ended]:
    """Runs `main` of a module once for each list of words; `folder` gets what is printed."""
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, module, json.dumps(commands), str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    codes = map(int, done.stdout.split())
    printed = lambda i, end: (folder / f"{i}.{end}").read_text()
    return [Ended(code, printed(i, "out"), printed(i, "err")) for i, code in enumerate(codes)]
