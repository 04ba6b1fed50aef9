"""Warps: the last frame filtered by two one-dimensional filters at each patch, down and across.

From one frame of a game to the next most pixels are only displaced. So a network that generates
residuals can predict them in two parts: a warp of the last frame, and the remaining residual. The
warp is adaptive separable convolution (Niklaus et al. 2017, https://arxiv.org/abs/1708.01692), used
for prediction as in Finn et al. 2016 (https://arxiv.org/abs/1605.07157), with one pair of filters
per patch. A filter is a softmax, so it can select a single pixel: exact displacements stay sharp,
however often they are repeated.

Each patch also predicts a log-variance, of the true frame around the warped one. It weighs the
noisy sample against the warp: more, the larger the variance and the lower the noise level.
"""

import jax
import jax.numpy as jnp

LOG_VARIANCES = -5.0, 1.0  # the smallest and the largest
STAY = 4.0  # initial logit of a filter's middle: an untrained filter has 3/4 of its weight there


@jax.named_scope("warp")
def velocity(
    sample: jax.Array,
    warped: jax.Array,
    log_variance: jax.Array,
    rest: jax.Array,
    alpha_bar: jax.Array,
) -> jax.Array:
    """The velocity of samples x = √ᾱ z + √(1−ᾱ) ε, given a prediction of z; all broadcast.

    If z ~ N(warped, s²), where s² = e^log_variance, then v = √ᾱ ε − √(1−ᾱ) z has the mean

        E[v | x] = (√ᾱ √(1−ᾱ) (1 − s²) x − √(1−ᾱ) warped) / (ᾱ s² + 1 − ᾱ)

    and the standard deviation s / √(ᾱ s² + 1 − ᾱ), which is the unit of `rest`. This is the
    preconditioning of Karras et al. 2022 (https://arxiv.org/abs/2206.00364, §5), with a mean that
    is not 0 and a deviation for each patch. With log_variance 0 it is rest − √(1−ᾱ) warped.
    """
    variance = jnp.exp(jnp.clip(log_variance, *LOG_VARIANCES))
    total = alpha_bar * variance + 1 - alpha_bar
    sigma = jnp.sqrt(1 - alpha_bar)
    mean = jnp.sqrt(alpha_bar) * sigma * (1 - variance) * sample - sigma * warped
    return mean / total + jnp.sqrt(variance / total) * rest


@jax.named_scope("warp")
def residual(
    last_BTHWC: jax.Array, scores_BTSF: jax.Array, *, reach: int, patch: int, sharpness: float = 1.0
) -> jax.Array:
    """The warped frames minus the frames, by patch of `patch` pixels, float32 [B, T, S, P · P · C].

    Args:
        last_BTHWC: the frames to warp, float; beyond its edge a frame repeats it.
        scores_BTSF: logits of the filter down, then of the one across, each `DiTConfig.taps`
            numbers for pixels −reach … reach away. All 0: most of the weight is in the middle.
        reach: at most `patch`.
        sharpness: the power of the filters' weights, which are then made to sum to 1 again.
    """
    last = last_BTHWC.astype(jnp.float32)
    scores = scores_BTSF.astype(jnp.float32)
    around, inner = _around(last, reach, patch), slice(reach, reach + patch)
    down, across = jnp.split(scores, 2, axis=-1)
    warped = _filtered("...yr,...rsc->...ysc", _weights(down, reach, sharpness), around, patch)
    warped = _filtered("...xs,...ysc->...yxc", _weights(across, reach, sharpness), warped, patch)
    return (warped - around[..., inner, inner, :]).reshape(*scores.shape[:3], -1)


def _weights(scores, reach: int, sharpness: float) -> jax.Array:
    logits = scores.at[..., reach].add(STAY)
    return jax.nn.softmax(logits if sharpness == 1 else sharpness * logits, axis=-1)


def _filtered(axes: str, filter_, around, patch: int) -> jax.Array:
    """Applies the filter at each of `patch` positions, as the product with a band matrix."""
    length = filter_.shape[-1] + patch - 1
    # Row i is the filter shifted right by i: rows of length + 1, reshaped to rows of length.
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
