"""Pixels that move: the last frame seen through two filters at each patch, down and across.

From one frame of a game to the next most pixels only move. So a network that draws changes may say
them in two parts: whence the pixels come, and what is left to draw. The first part is adaptive
separable convolution (Niklaus et al. 2017, https://arxiv.org/abs/1708.01692), used to predict as in
Finn et al. 2016 (https://arxiv.org/abs/1605.07157), with one pair of filters for a whole patch. A
filter is a softmax, so it can point at one place: what is moved exactly stays sharp, however often
it is moved.

Beside them each patch says how far the truth may be from what they find, and so how much the
noised sample is to be heeded: the more, the less is known, and the less noise is left in it.
"""

import jax
import jax.numpy as jnp

LOG_VARIANCES = -5.0, 1.0  # logarithms of the least and the largest variance
STAY = 4.0  # what the middle of a filter has before anything is learned: three quarters stay


def velocity(
    sample: jax.Array, moved: jax.Array, doubt: jax.Array, rest: jax.Array, alpha_bar: jax.Array
) -> jax.Array:
    """The velocity of samples x = √ᾱ z + √(1−ᾱ) ε, of whose z a guess is known; all broadcast.

    If z ~ N(moved, s²), where s² = e^doubt, then of v = √ᾱ ε − √(1−ᾱ) z there is known

        E[v | x] = (√ᾱ √(1−ᾱ) (1 − s²) x − √(1−ᾱ) moved) / (ᾱ s² + 1 − ᾱ)

    and what is not has the deviation s / √(ᾱ s² + 1 − ᾱ), the unit of `rest`: the preconditioning
    of Karras et al. 2022 (https://arxiv.org/abs/2206.00364, §5), for a guess that is not 0, and a
    deviation that is not the data's but each patch's own. With doubt 0 it is rest − √(1−ᾱ) moved.
    """
    variance = jnp.exp(jnp.clip(doubt, *LOG_VARIANCES))
    whole = alpha_bar * variance + 1 - alpha_bar
    sigma = jnp.sqrt(1 - alpha_bar)
    known = jnp.sqrt(alpha_bar) * sigma * (1 - variance) * sample - sigma * moved
    return known / whole + jnp.sqrt(variance / whole) * rest


def change(last_BTHWC: jax.Array, scores_BTSF: jax.Array, *, reach: int, patch: int) -> jax.Array:
    """What the filters change of each patch of `patch` pixels, float32 [B, T, S, P · P · C].

    Args:
        last_BTHWC: the frames that are seen, float; beyond its edge a frame repeats it.
        scores_BTSF: of the filter down, then of the one across, the logits of `DiTConfig.taps`
            weights for pixels −reach … reach away. 0: most of a pixel stays.
        reach: at most `patch`.
    """
    last = last_BTHWC.astype(jnp.float32)
    scores = scores_BTSF.astype(jnp.float32)
    around, inner = _around(last, reach, patch), slice(reach, reach + patch)
    down, across = jnp.split(scores, 2, axis=-1)
    seen = _filtered("...yr,...rsc->...ysc", _weights(down, reach), around, patch)
    seen = _filtered("...xs,...ysc->...yxc", _weights(across, reach), seen, patch)
    return (seen - around[..., inner, inner, :]).reshape(*scores.shape[:3], -1)


def _weights(scores, reach: int) -> jax.Array:
    return jax.nn.softmax(scores.at[..., reach].add(STAY), axis=-1)


def _filtered(axes: str, filter_, around, patch: int) -> jax.Array:
    """`around` through the filter at each of `patch` places, as the product with a band matrix."""
    length = filter_.shape[-1] + patch - 1
    # Row i is the filter, moved right by i: rows of length + 1, read as rows of length.
    padded = jnp.pad(filter_, [(0, 0)] * (filter_.ndim - 1) + [(0, patch)])
    rows = jnp.concatenate([padded] * patch, axis=-1)[..., : patch * length]
    band = rows.reshape(*filter_.shape[:-1], patch, length)
    return jnp.einsum(axes, band, around, precision=jax.lax.Precision.HIGHEST)


def _around(frames_BTHWC, reach: int, patch: int) -> jax.Array:
    """Each patch with the `reach` pixels around it: [B, T, S, P + 2 reach, P + 2 reach, C]."""
    B, T, H, W, C = frames_BTHWC.shape
    edge = [(0, 0), (0, 0), (patch, patch), (patch, patch), (0, 0)]
    blocks = jnp.pad(frames_BTHWC, edge, mode="edge")
    rows, columns, far = H // patch, W // patch, patch - reach
    blocks = blocks.reshape(B, T, rows + 2, patch, columns + 2, patch, C)
    three = [blocks[:, :, i : i + rows] for i in range(3)]
    blocks = jnp.concatenate(three, axis=3)[:, :, :, far : 3 * patch - far]
    three = [blocks[:, :, :, :, i : i + columns] for i in range(3)]
    blocks = jnp.concatenate(three, axis=5)[:, :, :, :, :, far : 3 * patch - far]
    return blocks.swapaxes(3, 4).reshape(B, T, rows * columns, *blocks.shape[3:4], -1, C)
