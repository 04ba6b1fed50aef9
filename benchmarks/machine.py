"""What a figure depends on besides our code: the machine, its speed, and the versions."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

# Sizes of the configs (`configs/NAME.py` says the same, and a test holds them together), so that
# benchmarks run where only jax, flax, optax and orbax are installed.
SIZES = {
    "debug": {"hidden_size": 256, "depth": 2, "num_heads": 4, "max_frames": 16},
    "pocket": {"hidden_size": 192, "depth": 4, "num_heads": 4, "max_frames": 32},
    "small": {"hidden_size": 512, "depth": 6, "num_heads": 8, "max_frames": 32},
    "large": {"hidden_size": 640, "depth": 8, "num_heads": 8, "max_frames": 32},
}
COMMON = {"patch_size": 8, "image_size": 64, "num_actions": 15}


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


def seconds(call: Callable[[], object], *, repeats: int = 3, at_least: float = 0.2) -> float:
    """Median seconds of a call that has been made once before (so that it is compiled)."""
    jax.block_until_ready(call())
    taken = []
    while len(taken) < repeats or sum(taken) < at_least:
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matmul_flops_per_second(dtype, size: int | None = None) -> float:
    """Measured speed of a large square matrix product on random data, operations a second."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: product(a, b))


def peak_bytes() -> int:
    """Most memory used so far: of the device where it tells, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    head = list(rows[0])
    shown = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [head, ["---"] * len(head), *([shown(row[k]) for k in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
