"""Rollout quality by horizon, with its floors and its ceiling.

Horizon h is the h-th frame after the prompt. "Copy last" repeats the last given frame: a
model below it is no better than a constant picture. "Reconstruction" is the network's output for
each real frame with almost no noise: the ceiling of its rendering. "Blur" is each real frame
blurred: PSNR penalises it little, people and LPIPS do.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from cwm_jax.coinrun import to_model, to_pixels
from cwm_jax.diffusion import residual, schedule
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.evaluation import bootstrap
from cwm_jax.evaluation.frame_scores import Scores
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params

HORIZONS = (*range(1, 11), 16, 31, 64, 120)
BLUR = 1.0  # pixels: standard deviation of the Gaussian
PSNR_CAP = 60.0  # dB: value in means for a frame equal to the real one (infinite PSNR)


def horizons_to(longest: int) -> tuple[int, ...]:
    """The horizons up to `longest`, inclusive."""
    return (*(h for h in HORIZONS if h < longest), longest)


def summary(scores: Scores, horizons: Sequence[int]) -> dict:
    """For each measure: `at` a horizon, the `mean` up to it, and `by_frame` for curves.

    Everything is a mean over clips with a bootstrap interval. `identical` is the share of frames
    up to each horizon that equal the real ones, and so count as `PSNR_CAP` dB.
    """
    results = {name: by_horizon(capped(x), horizons) for name, x in scores.measured().items()}
    same = np.isinf(scores.psnr)
    results["identical"] = {str(h): float(same[:, :h].mean()) for h in horizons}
    return results


def capped(values: np.ndarray) -> np.ndarray:
    """PSNR in dB, at most `PSNR_CAP`; SSIM is below and unchanged."""
    return np.minimum(values, PSNR_CAP)


def by_horizon(values_BF: np.ndarray, horizons: Sequence[int]) -> dict:
    mean, low, high = bootstrap.of_means(values_BF)
    at = {str(h): as_dict(mean[h - 1], low[h - 1], high[h - 1]) for h in horizons}
    upto = {str(h): as_dict(*bootstrap.of_mean(clip_means(values_BF[:, :h]))) for h in horizons}
    return {
        "at": at,
        "mean": upto,
        "by_frame": {
            name: [*map(float, x)] for name, x in zip(_NAMES, (mean, low, high), strict=True)
        },
    }


_NAMES = "mean", "low", "high"


def series(mean, low, high) -> dict[str, list[float]]:
    """Means and intervals of a whole curve."""
    return {name: x.tolist() for name, x in zip(_NAMES, (mean, low, high), strict=True)}


def as_dict(mean: float, low: float, high: float) -> dict[str, float]:
    return dict(zip(_NAMES, map(float, (mean, low, high)), strict=True))


def clip_means(values_BF: np.ndarray) -> np.ndarray:
    """Mean of each clip's frames, [B]; NaN for a clip that has none that count."""
    present = ~np.isnan(values_BF)
    with np.errstate(invalid="ignore"):
        return np.where(present, values_BF, 0).sum(1) / present.sum(1)


def copy_last(prompt_BPHWC: np.ndarray, frames: int) -> np.ndarray:
    """The last given frame, `frames` times (a view)."""
    last = prompt_BPHWC[:, -1:]
    return np.broadcast_to(last, (len(last), frames, *last.shape[2:]))


def blurred(frames_BFHWC: np.ndarray) -> np.ndarray:
    """Every frame filtered by a Gaussian of `BLUR` pixels, uint8."""
    sigma = (0, 0, BLUR, BLUR, 0)
    return np.stack(
        [ndimage.gaussian_filter(x[None], sigma, mode="nearest")[0] for x in frames_BFHWC]
    )


def reconstruction(network: DiTConfig, params: Params, frames_BTHWC, actions_BT) -> np.ndarray:
    """The single-step x0 of every real frame at the lowest noise level, without noise.

    Frames are predicted in windows of `max_frames`, as in training. Returns uint8 [B, T, H, W, C].
    With history, windows overlap by a frame, since the first of a window has no residual.
    """
    length = frames_BTHWC.shape[1]
    window = min(network.max_frames, length)
    result = np.empty_like(frames_BTHWC)
    first = residual.counted(network).start
    for clip in range(len(frames_BTHWC)):
        for start in range(0, max(length - first, 1), max(window - first, 1)):
            start = min(start, length - window)
            span = slice(start, start + window)
            shown = frames_BTHWC[clip, span][None], actions_BT[clip, span][None]
            rendered = _reconstruct(params, *shown, network=network)[0]
            known = first if start else 0
            result[clip, start + known : start + window] = rendered[known:]
    return result


@functools.partial(jax.jit, static_argnames="network")
def _reconstruct(params, frames_BTHWC, actions_BT, *, network: DiTConfig):
    t_BT = jnp.zeros(frames_BTHWC.shape[:2], jnp.int32)
    frames_BTHWC = to_model(frames_BTHWC)
    bound = bind(network, params)
    earlier = bound.earlier(frames_BTHWC)
    x0 = bound.to_sample(frames_BTHWC, earlier)
    shown = schedule.noised(x0, t_BT, jnp.zeros_like(x0)).x
    return to_pixels(bound.frames(shown, t_BT, actions_BT, earlier))
