"""Peak speed of a device: matrix products and memory copies, measured."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def best_time(function: Callable, *args, rounds: int = 3, calls: int = 4) -> float:
    """Seconds per call of a jitted function, the best of `rounds` of `calls` calls in a row."""
    jax.block_until_ready(function(*args))  # compiles
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def matmul_flops(dtype: jnp.dtype) -> float:
    """Floating point operations a second of one device in a large product of matrices."""
    size = 1024 if _on_cpu() else 8192
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=exact))
    # Random numbers: chips multiply zeros faster, as they need less power for them.
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
    return 2 * size**3 / best_time(product, a, b)


def copy_bytes() -> float:
    """Bytes a second that one device reads and writes in a large copy, both counted."""
    count = 2**24 if _on_cpu() else 2**29
    array = jnp.zeros(count, jnp.float32)
    return 8 * count / best_time(jax.jit(lambda x: x + 1), array)


def memory_limit() -> int | None:
    """Bytes that a program may use on one device, or None where it is unknown."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
