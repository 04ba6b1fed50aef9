"""Picture quality, computed on the device; results equal scikit-image's."""

import jax
import jax.numpy as jnp

_WINDOW = 7  # scikit-image's default for `structural_similarity`
_C1, _C2 = 0.01**2, 0.03**2


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared error of each picture; a and b [..., H, W, C] in [0, 1] → [...]."""
    return jnp.square(a - b).mean((-3, -2, -1))


def masked_mse(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error over the pixels of `mask` (bool [..., H, W]); NaN if it has none."""
    squared = jnp.square(a - b).mean(-1)
    count = mask.sum((-2, -1))
    return jnp.where(count, (squared * mask).sum((-2, -1)) / count, jnp.nan)


def psnr_of_mse(mse: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB for values in [0, 1]; infinite if the error is 0."""
    return -10 * jnp.log10(mse)


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each picture; a and b as for `mse`."""
    return psnr_of_mse(mse(a, b))


def _local_mean(x_BHWC: jax.Array) -> jax.Array:
    """Means over 7 × 7 windows inside the picture, [B, H − 6, W − 6, C]."""
    window = (1, _WINDOW, _WINDOW, 1)
    total = jax.lax.reduce_window(x_BHWC, 0.0, jax.lax.add, window, (1, 1, 1, 1), "VALID")
    return total / _WINDOW**2


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of each picture; a and b [..., H, W, C] in [0, 1] → [...].

    Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, with scikit-image's defaults: 7 × 7
    uniform windows, sample covariances, mean over places away from the border and over channels.
    """
    shape = a.shape[:-3]
    # Variances are differences of close numbers: centring on ½ reduces the float32 error.
    a, b = (x.reshape(-1, *x.shape[-3:]).astype(jnp.float32) - 0.5 for x in (a, b))
    sample = _WINDOW**2 / (_WINDOW**2 - 1)
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    variance_a = sample * (_local_mean(a * a) - mean_a * mean_a)
    variance_b = sample * (_local_mean(b * b) - mean_b * mean_b)
    covariance = sample * (_local_mean(a * b) - mean_a * mean_b)
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    most = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return (likeness / most).mean((-3, -2, -1)).reshape(shape)
