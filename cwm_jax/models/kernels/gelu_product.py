"""The gradient of a GELU that a matrix product follows, as one kernel.

With y = gelu(x) · w the gradient of x is (grad · wᵀ) gelu′(x). XLA writes the product, which has
the size of x, and reads it again for gelu′; here each tile of the product is multiplied by gelu′
before it is written, and its rows are summed for the gradient of the bias that x includes. For w of
4 D × D numbers that is 9 D numbers a row to read and write instead of 17 D.

Written with Pallas for its Triton backend.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cwm_jax.models.kernels.triton_call import triton_call

_2_SQRT_2_OVER_PI = 1.5957691216057308
_CUBIC = 0.044715
_LOG2_E = 1.4426950408889634


class Tiling(NamedTuple):
    """The tile of one program; the result does not depend on it."""

    rows: int = 128
    columns: int = 128
    depth: int = 32  # of the product, at a time
    warps: int = 8  # of 32 threads
    stages: int = 4  # of loads in flight


_TILING = Tiling()


def _sigma(exponent: jax.Array) -> jax.Array:
    """1 / (1 + 2^exponent)."""
    return 1 / (1 + jnp.exp2(exponent))


def _quick_sigma(exponent: jax.Array) -> jax.Array:
    """`_sigma` by the approximate instructions of NVIDIA GPUs, to a few units in the last place.

    Triton's own exponential and division handle denormal numbers, in three times as many
    instructions.
    """
    (found,) = triton.elementwise_inline_asm(
        "{.reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, e;}",
        args=[exponent],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(exponent.shape, jnp.float32)],
    )
    return found


def slope(x: jax.Array, sigma: Callable[[jax.Array], jax.Array] = _sigma) -> jax.Array:
    """gelu′ of the GELU by tanh (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

    With v = 2 √(2/π) (x + 0.044715 x³) it is x σ(v), since (1 + tanh(v / 2)) / 2 = σ(v). So the
    derivative is σ + x σ (1 − σ) v′, with one exponential, which GPUs compute in one instruction.
    """
    square = x * x
    exponent = x * (-_2_SQRT_2_OVER_PI * _LOG2_E - _2_SQRT_2_OVER_PI * _LOG2_E * _CUBIC * square)
    found = sigma(exponent)
    inner = _2_SQRT_2_OVER_PI + 3 * _CUBIC * _2_SQRT_2_OVER_PI * square
    return found + x * inner * (found - found * found)


def fits(x: jax.Array, kernel_HO: jax.Array) -> bool:
    """Whether the kernel supports x [..., H] and the product's matrix: whole tiles alone."""
    sizes = x.size // x.shape[-1], *kernel_HO.shape
    tiles = _TILING.rows, _TILING.columns, _TILING.depth
    return all(size % tile == 0 for size, tile in zip(sizes, tiles, strict=True))


def gradient(grad_RO, kernel_HO, x_RH, *, tiling: Tiling = _TILING, interpret=False):
    """(grad · kernelᵀ) gelu′(x), [R, H] in the dtype of x, and its sum over rows, float32 [H].

    Products, gelu′ and sums are float32.

    Args:
        grad_RO: gradient of gelu(x) · kernel, of R rows.
        kernel_HO: the matrix of the product.
        x_RH: the argument of the GELU.
    """
    (rows, size), outputs = x_RH.shape, kernel_HO.shape[1]
    across = size // tiling.columns  # programs of the same rows, which read the same gradients
    of_x, sums = triton_call(
        functools.partial(
            _gradient, depth=tiling.depth, sigma=_sigma if interpret else _quick_sigma
        ),
        grid=(rows // tiling.rows * across,),
        in_specs=[
            pl.BlockSpec((tiling.rows, outputs), lambda i: (i // across, 0)),
            pl.BlockSpec((tiling.columns, outputs), lambda i: (i % across, 0)),
            pl.BlockSpec((tiling.rows, tiling.columns), lambda i: (i // across, i % across)),
        ],
        out_specs=[
            pl.BlockSpec((tiling.rows, tiling.columns), lambda i: (i // across, i % across)),
            pl.BlockSpec((1, tiling.columns), lambda i: (i // across, i % across)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x_RH.shape, x_RH.dtype),
            jax.ShapeDtypeStruct((rows // tiling.rows, size), jnp.float32),
        ],
        warps=tiling.warps,
        stages=tiling.stages,
        interpret=interpret,
        name="gelu_product_backward",
    )(grad_RO, kernel_HO, x_RH)
    return of_x, sums.sum(0)


def _gradient(grad_ref, kernel_ref, x_ref, out_ref, sums_ref, *, depth: int, sigma):
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add(i, total):
        at = pl.ds(i * depth, depth)
        a, b = grad_ref[:, at], kernel_ref[:, at]
        over = (((1,), (1,)), ((), ()))
        return total + lax.dot_general(
            a, b, over, precision=exact, preferred_element_type=jnp.float32
        )

    zeros = jnp.zeros(x_ref.shape, jnp.float32)
    total = lax.fori_loop(0, grad_ref.shape[1] // depth, add, zeros)
    of_x = total * slope(x_ref[...].astype(jnp.float32), sigma)
    out_ref[...] = of_x.astype(out_ref.dtype)
    sums_ref[0] = of_x.sum(0)
