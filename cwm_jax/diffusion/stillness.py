"""Keeps what stands still: hardly changed patches of a frame stay exactly as they were.

While the camera of a game stands still, most of a real frame is identical to the last one. A
generated frame differs from it by some tenth of a colour everywhere, which adds up to visible noise
within seconds. So where nine in ten patches of a generated frame differ from the last frame by less
than a threshold, these patches are those of the last frame. While the camera moves nothing is
kept: there, small residuals are needed to repair displaced patches.
"""

import jax
import jax.numpy as jnp

from cwm_jax.models.config import STILL_PATCH as PATCH

SHARE = 0.9  # of the patches that must hardly change


@jax.named_scope("stillness")
def kept(frame_BHWC: jax.Array, last_BHWC: jax.Array, threshold: float) -> jax.Array:
    """The frames with patches of the last ones, float [B, H, W, C].

    Args:
        frame_BHWC: generated frames, float in [-1, 1]; H and W are multiples of `PATCH`.
        last_BHWC: the frames before them.
        threshold: of the root mean square change of a patch, in colours of 0…255.
    """
    B, H, W, C = frame_BHWC.shape
    changes = jnp.square(127.5 * (frame_BHWC - last_BHWC).astype(jnp.float32))
    by_patch = changes.reshape(B, H // PATCH, PATCH, W // PATCH, PATCH, C).mean((2, 4, 5))
    is_small = by_patch < threshold**2
    is_still = is_small.sum((1, 2)) >= SHARE * is_small[0].size
    stays = is_small & is_still[:, None, None]
    of_pixels = stays.repeat(PATCH, axis=1).repeat(PATCH, axis=2)[..., None]
    return jnp.where(of_pixels, last_BHWC, frame_BHWC)
