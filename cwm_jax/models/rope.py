"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

A head's K numbers are K/2 planes; position p rotates plane i by an angle p · ω_i. The planes pair
dimension i with dimension i + K/2 ("half-split"). The PyTorch original pairs 2i with 2i + 1;
`cwm_jax.tools.convert_torch` reorders the columns of its query and key weights to match, which
leaves every score, and so the model, unchanged.
"""

import jax
import jax.numpy as jnp
import numpy as np


def temporal_angles(positions, head_size: int) -> jax.Array | np.ndarray:
    """Angles for frames: p · 10⁴^(−2i/K), float32 [..., K/2], for whole positions [...].

    Positions that are not a jax array are compile-time constants, and so are their angles.
    """
    numpy = jnp if isinstance(positions, jax.Array) else np
    return numpy.asarray(positions, np.float32)[..., None] * temporal_frequencies(head_size)


def temporal_frequencies(head_size: int) -> np.ndarray:
    """10⁴^(−2i/K), float32 [K/2]."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / head_size
    return (1.0 / 10_000.0**exponents).astype(np.float32)


def spatial_frequencies(head_size: int) -> np.ndarray:
    """π · 1 … π · 128 at even distances, float32 [K/4]."""
    return _linspace(1, 128, head_size // 4) * np.float32(np.pi)


def spatial_angles(grid: int, head_size: int) -> np.ndarray:
    """Angles for the tokens of a frame, float32 [grid · grid, K/2], row by row.

    The first K/4 planes rotate by the row, the others by the column ("pixel" frequencies: π · 1 …
    π · 128 over positions −1 … 1, so neighbours differ even in the slowest plane).
    """
    line = _linspace(-1, 1, grid)[:, None] * spatial_frequencies(head_size)
    rows = np.repeat(line, grid, axis=0)
    columns = np.tile(line, (grid, 1))
    return np.concatenate([rows, columns], axis=-1)


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """float32 linspace as the original rounds it: a float32 step, taken from the nearer end.

    Angles reach 400 rad, where one rounding changes the angle by 3e-5 rad.
    """
    step = np.float64(np.float32((last - first) / max(count - 1, 1)))
    index = np.arange(count)
    line = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return line.astype(np.float32)


def rotate(x: jax.Array, angles) -> jax.Array:
    """Rotates the planes of x [..., K] by angles [..., K/2] (broadcast); keeps the dtype of x."""
    cos, sin = cos_sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def cos_sin(angles):
    """Cosines and sines of angles, float32; constants if the angles are constants."""
    if isinstance(angles, np.ndarray):
        exact = angles.astype(np.float64)
        return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)
