"""The call of a kernel that is written with Pallas for its Triton backend."""

import warnings
from collections.abc import Callable

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def triton_call(kernel: Callable, *, warps: int, stages: int = 1, **how) -> Callable:
    """`pallas_call` for NVIDIA GPUs; with `interpret=True` it runs anywhere.

    Args:
        warps: of 32 threads, of one program.
        stages: of loads in flight.
        how: the other arguments of `pallas_call`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of this backend
        params = triton.CompilerParams(num_warps=warps, num_stages=stages)
        return pl.pallas_call(kernel, compiler_params=params, **how)
