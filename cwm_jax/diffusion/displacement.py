"""Discrete displacements: each small patch of the next frame is copied from the last frame.

Averaging displaced pixels blurs them, and the blur accumulates over frames; copies of whole pixels
stay sharp. So a network can predict, for each small patch, a categorical distribution over all
whole-pixel displacements within reach. It is trained by cross-entropy against the displacements
that explain the true frame; generation uses the likeliest.

Displacement number k moves by k // (2 · across + 1) − down rows and k % (2 · across + 1) − across
columns: pixel (y, x) of the warped frame is pixel (y + rows, x + columns) of the last frame, whose
edge is repeated beyond it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.models.config import Reach
from cwm_jax.models.kernels import patch_errors

_TEMPERATURE = (
    0.05  # of the targets, in units of a patch's summed squared error, colours in [-1, 1]
)
_TIE = 0.002  # error per pixel of displacement: among equally good ones the smallest is the target


def distances(reach: Reach) -> np.ndarray:
    """|rows| + |columns| of each displacement, float32 [K]."""
    rows = np.abs(np.arange(-reach.down, reach.down + 1))
    columns = np.abs(np.arange(-reach.across, reach.across + 1))
    return (rows[:, None] + columns).reshape(-1).astype(np.float32)


@jax.named_scope("displacements")
def errors(last: jax.Array, target: jax.Array, reach: Reach) -> jax.Array:
    """Summed squared error of each patch under each displacement, float32 [..., h, w, K].

    No gradient flows through it. On an NVIDIA GPU a kernel computes it where the shape fits.

    Args:
        last, target: frames [..., H, W, C], float.
    """
    *batch, H, W, C = last.shape
    frames = [jax.lax.stop_gradient(x).reshape(-1, H, W, C) for x in (last, target)]
    formula = functools.partial(_errors, reach=reach)
    if patch_errors.fits(last.shape, reach):
        kernel = functools.partial(patch_errors.errors, reach=reach)
        found = jax.lax.platform_dependent(*frames, cuda=kernel, default=formula)
    else:
        found = formula(*frames)
    return found.reshape(*batch, *found.shape[1:])


def _errors(last_FHWC, target_FHWC, reach: Reach) -> jax.Array:
    """`errors` in plain JAX, float32 [F, h, w, K]."""
    _, H, W, C = last_FHWC.shape
    p, columns = reach.patch, 2 * reach.across + 1
    edge = [(0, 0), (reach.down, reach.down), (reach.across, reach.across), (0, 0)]
    padded = jnp.pad(last_FHWC, edge, mode="edge")
    pool = np.kron(np.eye(W // p), np.ones((p * C, 1))).astype(np.float32)  # [W · C, W / p]

    def displaced_down(row: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, row, H, axis=1)
        displaced = jnp.stack([rows[:, :, x : x + W] for x in range(columns)])
        squared = jnp.square((displaced - target_FHWC).astype(jnp.float32))
        summed = squared.reshape(columns, -1, H // p, p, W * C).sum(3)
        # Only their order matters, so reduced precision suffices.
        return jnp.einsum("xnhi,iw->nhwx", summed, pool, precision=jax.lax.Precision.HIGH)

    by_row = jax.lax.map(displaced_down, jnp.arange(2 * reach.down + 1))
    return jnp.moveaxis(by_row, 0, -2).reshape(-1, H // p, W // p, reach.count)


def targets(errors_K: jax.Array, reach: Reach) -> jax.Array:
    """Targets of the cross-entropy: softmax(−error / 0.05) with ties broken, float32 [..., K]."""
    return jax.nn.softmax(-(errors_K + _TIE * distances(reach)) / _TEMPERATURE, axis=-1)


def best(errors_K: jax.Array, reach: Reach) -> jax.Array:
    """The displacement of least error, among equal ones the smallest, int32 [...]."""
    return jnp.argmin(errors_K + _TIE * distances(reach), axis=-1).astype(jnp.int32)


@jax.named_scope("displacements")
def warp(last: jax.Array, chosen: jax.Array, reach: Reach) -> jax.Array:
    """The last frames [..., H, W, C] with each patch displaced as `chosen`, int [..., h, w]."""
    *_, H, W, C = last.shape
    frames = last.reshape(-1, H * W, C)
    every = chosen.reshape(-1, H // reach.patch, W // reach.patch)
    every = every.repeat(reach.patch, axis=1).repeat(reach.patch, axis=2)
    columns = 2 * reach.across + 1
    y = jnp.clip(np.arange(H)[:, None] + every // columns - reach.down, 0, H - 1)
    x = jnp.clip(np.arange(W) + every % columns - reach.across, 0, W - 1)
    places = (y * W + x).reshape(-1, H * W, 1)
    return jnp.take_along_axis(frames, places, axis=1).reshape(last.shape)


def to_grid(logits_BTSF: jax.Array, grid: int, reach: Reach) -> jax.Array:
    """Logits by token, [B, T, S, F], to logits by patch, [B, T, h, w, K]."""
    B, T, _, F = logits_BTSF.shape
    side = round((F // reach.count) ** 0.5)
    logits = logits_BTSF.reshape(B, T, grid, grid, side, side, reach.count).swapaxes(3, 4)
    return logits.reshape(B, T, grid * side, grid * side, reach.count)
