"""Evaluators: each iterates over batches and yields (name, value) pairs."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cwm_jax.coinrun import to_model, to_pixels
from cwm_jax.diffusion import schedule
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.evaluation import image_metrics
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.runtime import random_numbers
from cwm_jax.runtime.sharding import to_devices

Batches = Iterable[dict[str, np.ndarray]]


@functools.partial(jax.jit, static_argnames="network")
def _sums(params, batch, key, *, network: DiTConfig) -> dict[str, jax.Array]:
    """Sums over a batch's clips (those with mask) and frames, at random noise levels."""
    frames, bound = to_model(batch["frames"]), bind(network, params)
    earlier = bound.earlier(frames)
    x0 = bound.to_sample(frames, earlier)
    t_BT, noise = schedule.sample(key, x0.shape)
    sample = schedule.noised(x0, t_BT, noise)
    velocity = bound(sample.x, t_BT, batch["actions"], earlier)
    predicted = schedule.predict_clean(sample.x, velocity, t_BT)
    predicted = to_pixels(bound.to_frame(predicted, earlier)) / 255
    real = batch["frames"] / 255
    per_clip = {
        "loss": jnp.square(velocity - sample.velocity)[:, bound.counted].mean((1, 2, 3, 4)),
        "mse": image_metrics.mse(predicted, real)[:, bound.counted].mean(1),
        "ssim": image_metrics.ssim(predicted, real)[:, bound.counted].mean(1),
        "clips": jnp.ones(len(x0)),
    }
    return {name: (value * batch["mask"]).sum() for name, value in per_clip.items()}


def _means(network: DiTConfig, params: Params, batches: Batches, mesh: Mesh) -> dict[str, float]:
    """Means over all clips. Each batch's noise is the same at every call, so runs compare."""
    totals: dict[str, float] = {}
    for index, batch in enumerate(batches):
        key = jax.random.fold_in(random_numbers.key(0), index)
        for name, value in _sums(params, to_devices(batch, mesh), key, network=network).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return {name: value / totals["clips"] for name, value in totals.items()}


def validation(network, params, batches: Batches, mesh: Mesh) -> Iterator[tuple[str, float]]:
    """`val/loss`: the diffusion loss, each frame at a random noise level."""
    yield "val/loss", _means(network, params, batches, mesh)["loss"]


def epoch_end(network, params, batches: Batches, mesh: Mesh) -> Iterator[tuple[str, float]]:
    """`epoch/val_loss`, `epoch/psnr` (dB), `epoch/ssim`, as the original defines them.

    Quality of the single-step x0 prediction at random noise levels; PSNR from the mean squared
    error over the whole split. These measure denoising, not rollouts: at most noise levels,
    most of a frame is visible through the noise.
    """
    means = _means(network, params, batches, mesh)
    yield "epoch/val_loss", means["loss"]
    yield "epoch/psnr", float(image_metrics.psnr_of_mse(np.float32(means["mse"])))
    yield "epoch/ssim", means["ssim"]
