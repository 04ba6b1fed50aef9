"""Conditions of a measurement: the machine, the versions, the memory, and tables of them."""

import platform
import resource
from collections.abc import Sequence
from pathlib import Path

import jax


def description() -> dict[str, str]:
    """Processor or card, and the relevant versions."""
    device = jax.devices()[0]
    info = Path("/proc/cpuinfo")
    names = (
        [x for x in info.read_text(encoding="utf-8").splitlines() if "model name" in x]
        if info.exists()
        else []
    )
    cpu = f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()
    return {
        "device": f"{jax.device_count()} × {device.device_kind}"
        if device.platform != "cpu"
        else cpu,
        "backend": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def peak_bytes() -> int:
    """Peak memory so far: of the device if it reports it, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def table(rows: list[dict], columns: Sequence[str] = ()) -> str:
    """Rows as a Markdown table of `columns`, by default those of the first row.

    Missing values are empty; columns without values are left out.
    """
    head = [name for name in columns or rows[0] if any(name in row for row in rows)]
    lines = [head, ["---"] * len(head)]
    lines += [[_shown(row.get(name, "")) for name in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def described(row: dict) -> str:
    """A row as one line."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in row.items())


def _shown(value) -> str:
    if isinstance(value, dict):
        return described(value)
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")
