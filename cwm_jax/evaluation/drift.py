"""Whether a long rollout stays a game: sharpness, colours, patches, and when they give way.

The drawn frames are held against the real frames of the clip they start from, since every level
has its own scenery. Patches are compared as FID compares images (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500): the Fréchet distance between Gaussians fitted to features, here
whitened principal components of 8 × 8 pixel patches, which blur shrinks and noise swells.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cwm_jax.evaluation import intervals, quality

PATCH = 8  # pixels on a side
WINDOW = 16  # frames whose patches make one Gaussian
STRIDE = 4  # frames between the starts of neighbouring windows
_FEATURES = 24  # principal components
_LIMIT = 0.99  # quantile of the distances of real windows beyond which a window is not the game
_GREY = np.float32([0.299, 0.587, 0.114])


class Features(NamedTuple):
    """A linear map from patches to whitened features: (patch − mean) @ matrix."""

    mean: np.ndarray  # [192]
    matrix: np.ndarray  # [192, _FEATURES]


class Moments(NamedTuple):
    """What a frame's 64 patches are, on the whole: float64, [B, T, k] and [B, T, k, k]."""

    first: np.ndarray
    second: np.ndarray


def summary(drawn_BFHWC: np.ndarray, real_BTHWC: np.ndarray) -> dict:
    """Drift by time of F drawn frames, against T real frames of the same clips.

    The first half of each real clip is what windows are compared with; the windows of its second
    half say how far real frames go from it, and so where the limit lies. `frames_to_collapse` is
    the number of frames before the first window that is beyond the limit and whose followers, for
    a window's length, are too: the median over clips. Clips that never collapse count as F.
    `survived` is their share, and `false_alarms` the share of the real second halves that would
    be called collapsed.
    """
    features = fit_features(real_BTHWC)
    half = real_BTHWC.shape[1] // 2
    start = _gaussian(moments(real_BTHWC[:, :half], features))
    real_BW = distances(moments(real_BTHWC[:, half:], features), start)
    drawn_BW = distances(moments(drawn_BFHWC, features), start)
    limit = float(np.quantile(real_BW, _LIMIT))
    frames = drawn_BFHWC.shape[1]
    lasted = frames_to_collapse(drawn_BW, limit, frames)
    return {
        "frames": frames,
        "frames_to_collapse": quality.as_dict(*intervals.of_median(lasted)),
        "survived": float((lasted == frames).mean()),
        "false_alarms": float((frames_to_collapse(real_BW, limit, half) < half).mean()),
        "patch_limit": limit,
        "patch_distance": _by_window(drawn_BW),
        "patch_distance_real": float(real_BW.mean()),
        "sharpness": _by_frame(_ratio(sharpness, drawn_BFHWC, real_BTHWC)),
        "contrast": _by_frame(_ratio(contrast, drawn_BFHWC, real_BTHWC)),
        "colour_shift": _by_frame(colour_shift(drawn_BFHWC, real_BTHWC)),
    }


def fit_features(real_BTHWC: np.ndarray) -> Features:
    """Principal components of real patches, scaled to unit variance."""
    frames = real_BTHWC[:, :: max(1, real_BTHWC.shape[1] // 8)]  # neighbours are nearly the same
    patches = _patches(frames, np).reshape(-1, PATCH**2 * 3).astype(np.float64)
    mean = patches.mean(0)
    variances, axes = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    top = slice(-_FEATURES, None)
    scale = 1 / np.sqrt(np.maximum(variances[top], 1e-8))
    return Features(mean.astype(np.float32), (axes[:, top] * scale).astype(np.float32))


def moments(frames_BTHWC: np.ndarray, features: Features) -> Moments:
    """Mean and mean square of every frame's patch features."""
    parts = [jax.device_get(_moments(clip, *features)) for clip in frames_BTHWC]
    return Moments(*(np.stack(x).astype(np.float64) for x in zip(*parts, strict=True)))


@jax.jit
def _moments(frames_THWC, mean, matrix):
    z_TSK = (_patches(frames_THWC, jnp) - mean) @ matrix
    return z_TSK.mean(1), jnp.einsum("tsk,tsl->tkl", z_TSK, z_TSK) / z_TSK.shape[1]


def _patches(frames, xp):
    """uint8 [..., H, W, C] to float32 patches [..., S, 192] in [0, 1]."""
    small = rearrange(frames, "... (h p) (w q) c -> ... (h w) (p q c)", p=PATCH, q=PATCH)
    return small.astype(xp.float32) / 255


def distances(windows: Moments, start: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Fréchet distance of each window of frames from each clip's Gaussian, float64 [B, windows]."""
    length = windows.first.shape[1]
    size = min(WINDOW, length)
    found = []
    for first in range(0, length - size + 1, STRIDE):
        span = slice(first, first + size)
        found.append(frechet(*start, *_gaussian(Moments(*(x[:, span] for x in windows)))))
    return np.stack(found, axis=1)


def _gaussian(of: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean [B, k] and covariance [B, k, k] of all patches of each clip."""
    mean = of.first.mean(1)
    return mean, of.second.mean(1) - mean[:, :, None] * mean[:, None]


def frechet(mean_a, covariance_a, mean_b, covariance_b) -> np.ndarray:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½), for stacks of Gaussians: [..., k] → [...]."""
    values, axes = np.linalg.eigh(covariance_a)
    root = (axes * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(axes, -1, -2)
    cross = np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)
    trace = lambda x: np.trace(x, axis1=-2, axis2=-1)
    apart = np.square(mean_a - mean_b).sum(-1)
    return apart + trace(covariance_a) + trace(covariance_b) - 2 * np.sqrt(cross).sum(-1)


def frames_to_collapse(distance_BW: np.ndarray, limit: float, frames: int) -> np.ndarray:
    """Frames before the first window beyond `limit` that stays beyond it, `frames` if none."""
    beyond = np.pad(distance_BW > limit, ((0, 0), (0, WINDOW // STRIDE)), mode="edge")
    stays = functools.reduce(
        np.logical_and,
        (beyond[:, k : k + distance_BW.shape[1]] for k in range(WINDOW // STRIDE + 1)),
    )
    return np.where(stays.any(1), stays.argmax(1) * STRIDE, frames)


@jax.jit
def sharpness(frames_THWC) -> jax.Array:
    """Mean size of the Laplacian of each frame's grey values: [T, H, W, C] uint8 → [T]."""
    grey = frames_THWC.astype(jnp.float32) / 255 @ _GREY
    middle = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return jnp.abs(around - 4 * middle).mean((1, 2))


@jax.jit
def contrast(frames_THWC) -> jax.Array:
    """Standard deviation of each frame's colours about their mean: [T, H, W, C] uint8 → [T]."""
    return (frames_THWC.astype(jnp.float32) / 255).std((1, 2)).mean(-1)


@jax.jit
def _mean_colour(frames_THWC) -> jax.Array:
    return (frames_THWC.astype(jnp.float32) / 255).mean((1, 2))


def colour_shift(drawn_BFHWC: np.ndarray, real_BTHWC: np.ndarray) -> np.ndarray:
    """How far each frame's mean colour is from that of the real clip, 0…1: [B, F]."""
    ours, real = (_each(_mean_colour, x) for x in (drawn_BFHWC, real_BTHWC))
    return np.abs(ours - real.mean(1, keepdims=True)).mean(-1)


def _each(measure, frames_BTHWC: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(measure(clip)) for clip in frames_BTHWC])


def _ratio(measure, drawn_BFHWC: np.ndarray, real_BTHWC: np.ndarray) -> np.ndarray:
    """A measure of each drawn frame over its mean in the real clip: 1 is as in the game."""
    real = _each(measure, real_BTHWC).mean(1, keepdims=True)
    return _each(measure, drawn_BFHWC) / np.maximum(real, 1e-6)


def _by_frame(values_BF: np.ndarray) -> dict[str, list[float]]:
    names = "mean", "low", "high"
    means = intervals.of_means(values_BF)
    return {name: x.tolist() for name, x in zip(names, means, strict=True)}


def _by_window(values_BW: np.ndarray) -> dict[str, list[float]]:
    starts = {"frame": [STRIDE * i for i in range(values_BW.shape[1])]}
    return starts | _by_frame(values_BW)
