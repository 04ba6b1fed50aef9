"""What is drawn of a frame: all of it, or its change from the frame before.

Most of a frame stands in the frame before it. With `config.model.history` the network is shown the
last frames beside the one that it draws, as in DIAMOND (Alonso et al. 2024,
https://arxiv.org/abs/2405.12399), and the sample that is noised and drawn is the difference, scaled
to unit variance as Karras et al. 2022 advise (https://arxiv.org/abs/2206.00364, §5):

    z = (frame − frame before) / residual_scale

So a network that has learned nothing yet draws the last frame again, and noise that it fails to
remove reaches the picture only on the scale of a change. Without history the sample is the frame,
as in the original.

Frames are float in [-1, 1]. Where there is no earlier frame, the first stands for it.
"""

import jax
import jax.numpy as jnp

from cwm_jax.models.config import DiTConfig


def earlier(config: DiTConfig, frames_BTHWC: jax.Array) -> jax.Array | None:
    """The frames before each of a clip, newest first: [B, T, H, W, 3 · history], or None."""
    if not config.history:
        return None
    first, length = frames_BTHWC[:, :1], frames_BTHWC.shape[1]
    shifted = [frames_BTHWC]
    for _ in range(config.history):
        shifted.append(jnp.concatenate([first, shifted[-1]], axis=1)[:, :length])
    return jnp.concatenate(shifted[1:], axis=-1)


def counted(config: DiTConfig) -> slice:
    """The frames of a clip that are trained and judged: not the first, where changes are drawn."""
    return slice(1 if config.history else 0, None)


def to_sample(config: DiTConfig, frames: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """What is to be drawn of frames [..., H, W, 3], given the frames before them."""
    if earlier is None:
        return frames
    return (frames - earlier[..., :3]) / config.residual_scale


def to_frame(config: DiTConfig, sample: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """The frames [..., H, W, 3] of samples; clamped to [-1, 1] where they are made of changes,
    so that what a long rollout builds on stays a picture. Undoes `to_sample`.
    """
    if earlier is None:
        return sample
    return jnp.clip(earlier[..., :3] + config.residual_scale * sample, -1, 1)
