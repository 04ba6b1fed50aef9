"""The denoiser: turns a network's outputs into predictions for noisy samples.

The network (`cwm_jax.models.dit`) does not depend on the noise schedule. `Denoiser` defines the
rest: the sample of a frame (`cwm_jax.diffusion.residual`), the warp of the last frame, and the
velocity and clean frame from a noisy sample and the outputs. Training, evaluation, the sampler, the
KV cache and self-generated context all use it.
"""

import jax
import jax.numpy as jnp

from cwm_jax.diffusion import displacement, residual, schedule, stillness, warp
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import DiT, Outputs, Params, Stream

STAY = 0.1  # logit penalty per pixel of displacement; an untrained network displaces nothing


class Denoiser:
    """A network with its parameters, cheap to create inside each jitted function."""

    def __init__(self, net: DiT):
        self.net = net

    @property
    def config(self) -> DiTConfig:
        return self.net.config

    @property
    def counted(self) -> slice:
        """The frames of a clip that are trained and evaluated, see `residual.counted`."""
        return residual.counted(self.config)

    def earlier(self, frames_BTHWC: jax.Array) -> jax.Array | None:
        """The frames before each of a clip, see `residual.earlier`."""
        return residual.earlier(self.config, frames_BTHWC)

    def to_sample(self, frames: jax.Array, earlier: jax.Array | None) -> jax.Array:
        """The samples, to be noised, of frames [..., H, W, 3], given the frames before them."""
        return residual.to_sample(self.config, frames, earlier)

    def to_frame(self, sample: jax.Array, earlier: jax.Array | None) -> jax.Array:
        """The frames of clean samples; the inverse of `to_sample`."""
        return residual.to_frame(self.config, sample, earlier)

    def finished(self, sample_BHWC: jax.Array, earlier_BHWC: jax.Array | None) -> jax.Array:
        """The frames of denoised samples as a rollout goes on from them, [B, H, W, C].

        As `to_frame`, with what stands still kept where the config wants it (`stillness`).
        """
        frame_BHWC = self.to_frame(sample_BHWC, earlier_BHWC)
        if not self.config.still_threshold:
            return frame_BHWC
        return stillness.kept(frame_BHWC, earlier_BHWC[..., :3], self.config.still_threshold)

    def __call__(self, sample_BTHWC, t_BT, action_BT, earlier_BTHWC=None) -> jax.Array:
        """The velocity √ᾱ ε − √(1−ᾱ) x0 of every frame's sample, float32 [B, T, H, W, C].

        Args:
            sample_BTHWC: noisy samples (`to_sample`, then `schedule.noised`); T ≤ `max_frames`.
            t_BT: their noise levels, whole numbers 0…999.
            action_BT: the action that led into each frame, −1 for none.
            earlier_BTHWC: `earlier`, None for a network without history.
        """
        outputs = self.net(sample_BTHWC, t_BT, action_BT, earlier_BTHWC)
        return self.velocity(outputs, sample_BTHWC, alpha_bar(t_BT), earlier_BTHWC)

    def frames(self, sample_BTHWC, t_BT, action_BT, earlier_BTHWC=None) -> jax.Array:
        """The clean frames predicted from noisy samples in one step, float32 [B, T, H, W, C]."""
        velocity = self(sample_BTHWC, t_BT, action_BT, earlier_BTHWC)
        clean = schedule.predict_clean(sample_BTHWC, velocity, t_BT)
        return self.to_frame(clean, earlier_BTHWC)

    def context_stream(self, frames_BTHWC, actions_BT, level: int) -> Stream:
        """The stream of clean frames of a clip, as the KV cache encodes context frames.

        Args:
            frames_BTHWC: in [-1, 1]; T ≤ `max_frames`.
            actions_BT: the action that led into each frame, −1 for none.
            level: the noise level of context frames, `SamplerConfig.context_level`.
        """
        earlier = self.earlier(frames_BTHWC)
        tokens = self.net.tokens(self.to_sample(frames_BTHWC, earlier), earlier)
        modulations = self.net.modulations(jnp.full_like(actions_BT, level), actions_BT)
        return self.net.clip(tokens, modulations)[0]

    def velocity(
        self,
        outputs: Outputs,
        sample_BTHWC: jax.Array,
        alpha_bar: jax.Array,
        earlier_BTHWC: jax.Array | None = None,
        displacements_BThw: jax.Array | None = None,
    ) -> jax.Array:
        """The velocity of noisy samples, float32 [B, T, H, W, C].

        The sample and its share of signal (`alpha_bar`, [B, T] or []) are used where the network
        predicts the clean sample or warps the last frame; the earlier frames where it warps: by the
        given displacements, or the likeliest ones.
        """
        if outputs.log_variance is None:
            predicted = self.net.pixels(outputs.residual)
            if self.config.prediction == "velocity":
                return predicted
            of_pixels = jnp.asarray(alpha_bar)[..., None, None, None]
            return schedule.velocity_of_clean(sample_BTHWC, predicted, of_pixels)
        last = earlier_BTHWC[..., :3].astype(jnp.float32)
        warped = self._warped(outputs, last, displacements_BThw) / self.config.residual_scale
        velocity = warp.velocity(
            self.net.patches(sample_BTHWC),
            warped,
            outputs.log_variance,
            outputs.residual,
            jnp.asarray(alpha_bar)[..., None, None],
        )
        return self.net.pixels(velocity)

    def _warped(self, outputs: Outputs, last, displacements_BThw) -> jax.Array:
        """The warped last frame minus the last frame, in patches [B, T, S, P · P · C]."""
        config = self.config
        if config.warp_reach:
            how = dict(reach=config.warp_reach, patch=config.patch_size)
            return warp.residual(last, outputs.filters, sharpness=config.warp_sharpness, **how)
        if displacements_BThw is None:
            displacements_BThw = jnp.argmax(self.logits(outputs), axis=-1)
        warped = displacement.warp(last, displacements_BThw, config.reach)
        return self.net.patches(warped - last)

    def logits(self, outputs: Outputs) -> jax.Array:
        """Logits of the displacements of each small patch, float32 [B, T, h, w, K]."""
        reach = self.config.reach
        logits = displacement.to_grid(outputs.displacements, self.config.grid, reach)
        return logits - STAY * displacement.distances(reach)


def alpha_bar(t: jax.Array) -> jax.Array:
    """The share of signal at noise levels t, float32, of the same shape."""
    return jnp.asarray(schedule.alpha_bars())[t]


def bind(config: DiTConfig, params: Params) -> Denoiser:
    """The denoiser with these parameters."""
    return Denoiser(dit.bind(config, params))
