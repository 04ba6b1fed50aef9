"""Summed squared error of each patch of a frame under each displacement, as one kernel.

One program computes 64 patches of a frame, a patch in each thread, whose target stays in registers.
It goes through the displacements, those down one by one, those across some at a time: a pixel that
is loaded once is compared for all of these, and no sum needs communication between threads. For
2,304 frames of 64 × 64 pixels and 153 displacements XLA's program moves 30 GB, this one 1 GB.

So that neighbouring threads read neighbouring numbers, frames are rearranged first: column x is
number x // p of phase x % p, for patches of p × p pixels, and a row of a frame is [C, p, W / p].

Written with Pallas for its Triton backend.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cwm_jax.models.config import Reach
from cwm_jax.models.kernels.triton_call import triton_call

_PATCHES = 64  # of one program
_LARGEST = 48  # numbers of a patch, which a thread keeps in registers


class _Sizes(NamedTuple):
    """Compile-time parameters of the kernel."""

    height: int  # of a frame, in pixels
    colours: int  # C
    target: int  # columns of a phase of the target: the patches in a row
    last: int  # columns of a phase of the last frame, whose edge is repeated


def fits(frame_shape: tuple[int, ...], reach: Reach) -> bool:
    """Whether the kernel supports frames [..., H, W, C]."""
    *_, H, W, C = frame_shape
    p = reach.patch
    return p * p * C <= _LARGEST and (H // p) * (W // p) % _PATCHES == 0


def errors(last_FHWC, target_FHWC, reach: Reach, *, interpret=False) -> jax.Array:
    """See `cwm_jax.diffusion.displacement.errors`, for a shape that `fits`; without gradients."""
    frames, H, W, C = last_FHWC.shape
    p = reach.patch
    sizes = _Sizes(H, C, target=W // p, last=math.ceil((W + 2 * reach.across) / p))
    columns = np.clip(np.arange(sizes.last * p) - reach.across, 0, W - 1)
    last = _by_phase(last_FHWC.at[:, :, columns].get(mode="promise_in_bounds"), p)
    target = _by_phase(target_FHWC, p)
    patches = (H // p) * (W // p)
    parts = patches // _PATCHES  # of a frame
    a_frame = lambda size: pl.BlockSpec((None, size), lambda i: (jax.lax.div(i, parts), 0))
    found_FKn = triton_call(
        functools.partial(_kernel, reach=reach, sizes=sizes),
        grid=(frames * parts,),
        in_specs=[a_frame(last.shape[1]), a_frame(target.shape[1])],
        out_specs=a_frame(reach.count * patches),
        out_shape=jax.ShapeDtypeStruct((frames, reach.count * patches), jnp.float32),
        warps=_PATCHES // 32,
        interpret=interpret,
        name="patch_errors",
    )(last, target)
    return jnp.moveaxis(found_FKn.reshape(frames, reach.count, H // p, W // p), 1, -1)


def _by_phase(x_FHWC, patch: int) -> jax.Array:
    """[F, H, W, C] → [F, H · C · p · W / p]."""
    frames, H, W, C = x_FHWC.shape
    split = x_FHWC.reshape(frames, H, W // patch, patch, C)
    return split.transpose(0, 1, 4, 3, 2).reshape(frames, -1)


def _kernel(last_ref, target_ref, out_ref, *, reach: Reach, sizes: _Sizes):
    p, width = reach.patch, 2 * reach.across + 1
    patches = sizes.height // p * sizes.target
    part = jax.lax.rem(pl.program_id(0), patches // _PATCHES)
    patch = part * _PATCHES + jax.lax.iota(jnp.int32, _PATCHES)
    i, j = patch // sizes.target, patch % sizes.target
    line = lambda columns: sizes.colours * p * columns  # numbers of a row of pixels
    place = lambda c, x, columns: (c * p + x % p) * columns + x // p  # of a pixel in its row
    target = {
        (y, c, x): _load(
            target_ref, (i * p + y) * line(sizes.target) + j + place(c, x, sizes.target)
        )
        for y in range(p)
        for c in range(sizes.colours)
        for x in range(p)
    }

    def some_across(rows, down, start, count: int) -> None:
        """Stores the errors of `count` displacements across from number p · start on."""
        totals = [jnp.zeros(_PATCHES, jnp.float32)] * count
        for y in range(p):
            for c in range(sizes.colours):
                for x in range(p + count - 1):
                    pixel = _load(last_ref, rows[y] + start + place(c, x, sizes.last))
                    for n in range(max(x - p + 1, 0), min(x + 1, count)):
                        totals[n] += jnp.square(pixel - target[y, c, x - n])
        for n, total in enumerate(totals):
            number = down * width + start * p + n
            triton.store(out_ref.at[number * patches + patch], total)

    blocks = max(width // p - 1, 0)  # of p displacements each; after them one of the rest

    def one_down(down, carry):
        row = i * p + down - reach.down
        rows = [jnp.clip(row + y, 0, sizes.height - 1) * line(sizes.last) + j for y in range(p)]
        if blocks:
            jax.lax.fori_loop(0, blocks, lambda start, _: some_across(rows, down, start, p), None)
        some_across(rows, down, blocks, width - blocks * p)
        return carry

    jax.lax.fori_loop(0, 2 * reach.down + 1, one_down, 0)


def _load(ref, places):
    return triton.load(ref.at[places]).astype(jnp.float32)
