"""Samples of frames: the frame itself, or its residual from the previous frame.

Consecutive frames are similar. With `config.model.history` the network gets the last frames as
additional input, as in DIAMOND (Alonso et al. 2024, https://arxiv.org/abs/2405.12399), and the
sample that is noised and denoised is the residual, scaled to unit variance as in Karras et al. 2022
(https://arxiv.org/abs/2206.00364, §5):

    z = (frame − previous frame) / residual_scale

So an untrained network repeats the last frame, and remaining noise is scaled by `residual_scale`.
Without history the sample is the frame, as in the original.

Frames are float in [-1, 1]. Before the first frame, the first frame is repeated.
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
    """The frames of a clip that count in losses: with residuals, all but the first."""
    return slice(1 if config.history else 0, None)


def to_sample(config: DiTConfig, frames: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """The samples of frames [..., H, W, 3], given the frames before them."""
    if earlier is None:
        return frames
    return (frames - earlier[..., :3]) / config.residual_scale


def to_frame(config: DiTConfig, sample: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """The frames [..., H, W, 3] of samples; the inverse of `to_sample`.

    Frames from residuals are clamped to [-1, 1], so that errors stay bounded in long rollouts.
    """
    if earlier is None:
        return sample
    return jnp.clip(earlier[..., :3] + config.residual_scale * sample, -1, 1)
