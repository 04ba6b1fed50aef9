"""Where the tests keep compiled programs."""

import hashlib
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def folder() -> Path:
    """One for all tests, the processes that they start, and later runs; `make clean` removes it.

    It is of this kind of processor: a program compiled for one may not run on another.
    """
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("flags", "model name"))})
    name = hashlib.sha256("".join(kind).encode()).hexdigest()[:12]
    return Path(__file__).parents[1] / ".pytest_cache" / "programs" / name
