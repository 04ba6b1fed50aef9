"""How tests compile programs, and where these are kept."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# XLA of jax 0.10 compiles in half of the time so, and with a third of the memory maps; later ones
# may not know the flags.
_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_prefer_vector_width=128"
)
_QUICK = _FLAGS if version("jaxlib").startswith("0.10.") else ""


def environment() -> dict[str, str]:
    """Environment variables of the tests and of the programs that they start.

    Tiny networks take far longer to compile than to run; JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles
    as users do.
    """
    usual = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder()),
        # Also of single operations: each process would compile hundreds of them.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return usual | os.environ | {"XLA_FLAGS": f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()}


def folder() -> Path:
    """One for all tests, the processes that they start, and later runs; `make clean` removes it.

    It is of this kind of processor: a program compiled for one may not run on another.
    """
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("flags", "model name"))})
    name = hashlib.sha256("".join(kind).encode()).hexdigest()[:12]
    return Path(__file__).parents[1] / ".pytest_cache" / "programs" / name
