"""Residual addition and modulated LayerNorm as one fused kernel, forward and backward.

One program processes the S tokens of a frame, some rows at a time: a row's statistics need D
numbers, the sums over tokens for shift, scale and gate stay in registers until the frame is done.
The forward pass has no sums over tokens, so several programs share a frame where there are few.
XLA needs several kernels for this, each of which reads the activations again.

Written with Pallas for its Triton backend.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cwm_jax.models.kernels.triton_call import triton_call

EPSILON = 1e-6


class Tiling(NamedTuple):
    """How a program splits its frame; rows · D / (32 · warps) numbers in each thread.

    The backward kernel of 16 numbers a thread fits the registers of an H100, and that of 32 does
    not (compiled for sm_90a).
    """

    rows: int  # at a time
    warps: int  # of 32 threads


_FORWARD = Tiling(rows=4, warps=4)
_OF_A_THREAD = 16  # numbers of a row at most, in the backward pass
_PROGRAMS = 512  # of the forward pass at least: about four on each multiprocessor of an H100


def fits(x_BTSD: jax.Array) -> bool:
    """Whether the kernels support this shape: Triton needs powers of two."""
    tokens, size = x_BTSD.shape[-2:]
    return size & (size - 1) == 0 and 64 <= size <= 2048 and tokens % _FORWARD.rows == 0


def forward(x_FSD, update, shift_FD, scale_FD, *, tiling: Tiling = _FORWARD, interpret=False):
    """(x + gate · (product + bias), its modulated norm), each [F, S, D] in the dtype of x.

    Args:
        x_FSD: the residual stream of F frames.
        update: (product [F, S, D], bias [D], gate [F, D]), or None; then only the norm is returned.
        shift_FD, scale_FD: those of each frame.
    """
    frames, tokens, size = x_FSD.shape
    parts = _parts(frames, tokens, tiling)
    whole, row = _whole(tokens, size, parts), _row(size, parts)
    into = [] if update is None else [whole, _shared(size), row]
    outs = 1 if update is None else 2
    kernel = functools.partial(_forward, gated=update is not None, rows=tiling.rows)
    found = triton_call(
        kernel,
        grid=(frames * parts,),
        in_specs=[whole, *into, row, row],
        out_specs=[whole] * outs,
        out_shape=[jax.ShapeDtypeStruct(x_FSD.shape, x_FSD.dtype)] * outs,
        warps=tiling.warps,
        interpret=interpret,
        name="norm_forward",
    )(x_FSD, *(update or ()), shift_FD, scale_FD)
    return found[0] if update is None else tuple(found)


def backward(
    x_FSD, update, scale_FD, of_normed, of_x, *, tiling: Tiling | None = None, interpret=False
):
    """Gradients of `forward`: (of x, of product, sums), of product None without an update.

    Args:
        x_FSD: the normed stream, with the update if there is one.
        update, scale_FD: as in `forward`.
        of_normed: gradient of the norm [F, S, D].
        of_x: gradient of the stream from later layers [F, S, D].
        tiling: None: one row at a time, of as few warps as the registers allow.

    The sums, each [F, D], are the gradients of shift and scale, and with an update also of the
    gate, in the dtype of `scale_FD`, and the sum of the gradient of x, float32.
    """
    frames, tokens, size = x_FSD.shape
    # A warp alone waits for no other when it sums a row.
    tiling = tiling or Tiling(rows=1, warps=max(1, size // (32 * _OF_A_THREAD)))
    whole, row = _whole(tokens, size), _row(size)
    gated = update is not None
    into = [whole, _shared(size), row] if gated else []
    wholes = 2 if gated else 1
    sums = [scale_FD.dtype] * 3 + [jnp.float32] if gated else [scale_FD.dtype] * 2
    found = triton_call(
        functools.partial(_backward, gated=gated, rows=tiling.rows),
        grid=(frames,),
        in_specs=[whole, *into, row, whole, whole],
        out_specs=[whole] * wholes + [row] * len(sums),
        out_shape=[jax.ShapeDtypeStruct(x_FSD.shape, x_FSD.dtype)] * wholes
        + [jax.ShapeDtypeStruct((frames, size), dtype) for dtype in sums],
        warps=tiling.warps,
        interpret=interpret,
        name="norm_backward",
    )(x_FSD, *(update or ()), scale_FD, of_normed, of_x)
    return found[0], found[1] if gated else None, found[wholes:]


def _forward(*refs, gated: bool, rows: int):
    if gated:
        x_ref, product_ref, bias_ref, gate_ref, shift_ref, scale_ref, out_ref, normed_ref = refs
        bias, gate = _float(bias_ref[:]), _float(gate_ref[0])
    else:
        x_ref, shift_ref, scale_ref, normed_ref = refs
    shift, scale = _float(shift_ref[0]), 1 + _float(scale_ref[0])

    def some(i, carry):
        at = pl.ds(i * rows, rows)
        x = _float(x_ref[0, at])
        if gated:
            x += gate * (_float(product_ref[0, at]) + bias)
            out_ref[0, at] = x.astype(out_ref.dtype)
            x = _float(x.astype(out_ref.dtype))  # as the backward pass reads it
        normed, _ = _norm(x)
        normed_ref[0, at] = (normed * scale + shift).astype(normed_ref.dtype)
        return carry

    jax.lax.fori_loop(0, x_ref.shape[1] // rows, some, 0)


def _backward(*refs, gated: bool, rows: int):
    if gated:
        x_ref, product_ref, bias_ref, gate_ref, scale_ref, of_normed_ref, of_x_ref = refs[:7]
        out_ref, of_product_ref, *sum_refs = refs[7:]
        bias, gate = _float(bias_ref[:]), _float(gate_ref[0])
    else:
        x_ref, scale_ref, of_normed_ref, of_x_ref, out_ref, *sum_refs = refs
    scale = 1 + _float(scale_ref[0])

    def some(i, sums):
        at = pl.ds(i * rows, rows)
        grad = _float(of_normed_ref[0, at])
        normed, inverse = _norm(_float(x_ref[0, at]))
        inner = grad * scale
        along = normed * _mean(inner * normed)
        of_x = _float(of_x_ref[0, at]) + inverse * (inner - _mean(inner) - along)
        out_ref[0, at] = of_x.astype(out_ref.dtype)
        parts = [grad, grad * normed]
        if gated:
            of_product_ref[0, at] = (gate * of_x).astype(of_product_ref.dtype)
            parts += [of_x * (_float(product_ref[0, at]) + bias), of_x]
        return tuple(a + b for a, b in zip(sums, parts, strict=True))

    # Summed over rows only at the end: each such sum needs communication between warps.
    zeros = (jnp.zeros((rows, x_ref.shape[2]), jnp.float32),) * len(sum_refs)
    sums = jax.lax.fori_loop(0, x_ref.shape[1] // rows, some, zeros)
    for ref, found in zip(sum_refs, sums, strict=True):
        ref[0] = found.sum(0).astype(ref.dtype)


def _norm(x):
    centred = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(centred * centred) + EPSILON)
    return centred * inverse, inverse


def _mean(x):
    return x.sum(-1, keepdims=True) * (1 / x.shape[-1])


def _float(x):
    return x.astype(jnp.float32)


def _parts(frames: int, tokens: int, tiling: Tiling) -> int:
    """Programs for each frame, so that there are `_PROGRAMS` or each has `tiling.rows` tokens."""
    parts = 1
    while frames * parts < _PROGRAMS and tokens % (2 * parts * tiling.rows) == 0:
        parts *= 2
    return parts


def _whole(tokens: int, size: int, parts: int = 1) -> pl.BlockSpec:
    """A frame's tokens, or its part that a program processes."""
    return pl.BlockSpec(
        (1, tokens // parts, size), lambda i: (jax.lax.div(i, parts), jax.lax.rem(i, parts), 0)
    )


def _row(size: int, parts: int = 1) -> pl.BlockSpec:
    return pl.BlockSpec((1, size), lambda i: (jax.lax.div(i, parts), 0))


def _shared(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size,), lambda i: (0,))
