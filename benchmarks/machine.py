"""What stands beside a figure: the machine, the versions, the memory, and tables of them."""

import platform
import resource
from pathlib import Path

import jax


def description() -> dict[str, str]:
    """Processor or card, and the versions that matter."""
    device = jax.devices()[0]
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
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
    """Most memory used so far: of the device where it tells, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def resident_bytes() -> int:
    """Memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    head = list(rows[0])
    shown = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [head, ["---"] * len(head), *([shown(row[k]) for k in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
