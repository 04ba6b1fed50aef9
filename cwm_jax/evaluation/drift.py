"""Whether a long rollout stays a game: its patches, sharpness, contrast and colour by time.

The drawn frames are held against the real frames of the clip they start from, since every level
has its own scenery. Patches are compared as FID compares images (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500): the Fréchet distance between Gaussians fitted to features, here
whitened principal components of 8 × 8 pixel patches, which blur shrinks and noise swells.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cwm_jax.evaluation import bootstrap, nearest_real, rollout_quality
from cwm_jax.evaluation.lpips import Lpips

PATCH = 8  # pixels on a side
WINDOW = 16  # frames whose patches make one Gaussian
REAL = 160  # frames of a real clip that are looked at, where it has them
STRIDE = 4  # frames between the starts of neighbouring windows
REFERENCE = 2  # of real frames each so manieth is what others are held against
FEATURES = 64  # principal components
_LIMIT = 0.99  # quantile of real windows, by how far from the start they are, that is the limit
_GREY = np.float32([0.299, 0.587, 0.114])


class Features(NamedTuple):
    """A linear map from patches to whitened features: (patch − mean) @ matrix."""

    mean: np.ndarray  # [192]
    matrix: np.ndarray  # [192, FEATURES]


class Moments(NamedTuple):
    """What the frames of clips are, on the whole; float64, means over each frame."""

    first: np.ndarray  # [B, T, k], of its 64 patches' features
    second: np.ndarray  # [B, T, k, k], of their products
    sharpness: np.ndarray  # [B, T], size of the Laplacian of its grey values
    contrast: np.ndarray  # [B, T], standard deviation of its colours
    colour: np.ndarray  # [B, T, C]


class Signs(NamedTuple):
    """What is looked at in each window, float64 [B, windows], against the clip's own start."""

    patch_distance: np.ndarray  # Fréchet distance of the patches' features
    sharpness: np.ndarray  # 1: as sharp
    contrast: np.ndarray  # 1: as rich in contrast
    colour_shift: np.ndarray  # distance of the mean colours, 0…1


def summary(drawn_BFHWC: np.ndarray, real_BTHWC: np.ndarray, *, lpips: Lpips | None = None) -> dict:
    """Drift by time of F drawn frames, against T real frames of the same clips.

    With `lpips`, `nearest_real` too (`cwm_jax.evaluation.nearest_real`).

    The first half of each real clip is what windows are compared with; the windows of its second
    half say how far real frames go from it, and so where the `limits` lie. `frames_to_collapse`
    is the number of frames before the first window that is beyond a limit and whose followers,
    for a window's length, are too: the median over clips. Clips that never collapse count as F.
    `survived` is their share, and `false_alarms` the share of the real second halves that would
    be called collapsed.
    """
    features = fit_features(real_BTHWC)
    half = real_BTHWC.shape[1] // 2
    start = moments(real_BTHWC[:, :half], features)
    real = signs(moments(real_BTHWC[:, half:], features), start)
    drawn = signs(moments(drawn_BFHWC, features), start)
    limits = {name: limits_of(name, values) for name, values in real._asdict().items()}
    frames, rest = drawn_BFHWC.shape[1], real_BTHWC.shape[1] - half
    lasted = frames_to_collapse(beyond(drawn, limits), frames)
    by_window = {
        name: {
            "frame": [STRIDE * i for i in range(values.shape[1])],
            **rollout_quality.series(*bootstrap.of_means(values)),
            "real": float(getattr(real, name).mean()),
            "limits": limits[name],
        }
        for name, values in drawn._asdict().items()
    }
    nearest = {"nearest_real": _nearest(drawn_BFHWC, real_BTHWC, lpips)} if lpips else {}
    return nearest | {
        "frames": frames,
        "frames_to_collapse": rollout_quality.as_dict(*bootstrap.of_median(lasted)),
        "survived": float((lasted == frames).mean()),
        "false_alarms": float((frames_to_collapse(beyond(real, limits), rest) < rest).mean()),
        "by_window": by_window,
    }


def _nearest(drawn_BFHWC: np.ndarray, real_BTHWC: np.ndarray, lpips: Lpips) -> dict:
    """Every `STRIDE`-th frame against the first half of the clip; the second half is the floor.

    `mean` is over all these frames; `by_window` over the frames of each window; `frames_to_leave`
    are the frames before the first window that is further off than 99 % of those of real second
    halves and whose followers are too, the median over clips.
    """
    half = real_BTHWC.shape[1] // 2
    distances = lambda frames, real: nearest_real.distances(lpips, frames, real).places

    def found(clips_BFHWC) -> np.ndarray:
        pairs = zip(clips_BFHWC, real_BTHWC[:, :half:REFERENCE], strict=True)
        return np.stack([distances(clip[::STRIDE], real) for clip, real in pairs])

    drawn, real = found(drawn_BFHWC), found(real_BTHWC[:, half:])
    windows, real_windows = _over_windows(drawn), _over_windows(real)
    limit = float(np.quantile(real_windows, _LIMIT))
    lasted = frames_to_collapse(windows > limit, drawn_BFHWC.shape[1])
    return {
        "mean": rollout_quality.as_dict(*bootstrap.of_mean(drawn.mean(1))),
        "real": rollout_quality.as_dict(*bootstrap.of_mean(real.mean(1))),
        "frames_to_leave": rollout_quality.as_dict(*bootstrap.of_median(lasted)),
        "by_window": {
            "frame": [STRIDE * i for i in range(windows.shape[1])],
            **rollout_quality.series(*bootstrap.of_means(windows)),
            "real": float(real_windows.mean()),
            "limits": (0.0, limit),
        },
    }


def _over_windows(values_BN: np.ndarray) -> np.ndarray:
    """Means over the looked-at frames of each window, [B, windows]."""
    size = min(WINDOW // STRIDE, values_BN.shape[1])
    return np.lib.stride_tricks.sliding_window_view(values_BN, size, axis=1).mean(-1)


def limits_of(name: str, real_BW: np.ndarray) -> tuple[float, float]:
    """Between which values of a sign a window may be real.

    Twice as sharp is as far away as half as sharp, whichever the real clips happen to be.
    """
    if name in ("sharpness", "contrast"):
        most = float(np.exp(np.quantile(np.abs(np.log(real_BW)), _LIMIT)))
        return 1 / most, most
    return 0.0, float(np.quantile(real_BW, _LIMIT))


def beyond(found: Signs, limits: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """Windows with any sign outside its limits, bool [B, windows]."""
    outside = [
        (values < limits[name][0]) | (values > limits[name][1])
        for name, values in found._asdict().items()
    ]
    return np.logical_or.reduce(outside)


def fit_features(real_BTHWC: np.ndarray) -> Features:
    """Principal components of real patches, scaled to unit variance."""
    frames = real_BTHWC[:, :: max(1, real_BTHWC.shape[1] // 8)]  # neighbours are nearly the same
    patches = _patches(frames, np).reshape(-1, PATCH**2 * 3).astype(np.float64)
    mean = patches.mean(0)
    variances, axes = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    top = slice(-FEATURES, None)
    scale = 1 / np.sqrt(np.maximum(variances[top], 1e-8))
    return Features(mean.astype(np.float32), (axes[:, top] * scale).astype(np.float32))


def moments(frames_BTHWC: np.ndarray, features: Features) -> Moments:
    """All that signs are made of, clip by clip."""
    with jax.default_matmul_precision("highest"):  # else a GPU would judge otherwise, in TF32
        parts = [jax.device_get(_moments(clip, *features)) for clip in frames_BTHWC]
    return Moments(*(np.stack(x).astype(np.float64) for x in zip(*parts, strict=True)))


@jax.jit
def _moments(frames_THWC, mean, matrix) -> Moments:
    z_TSK = (_patches(frames_THWC, jnp) - mean) @ matrix
    colours = frames_THWC.astype(jnp.float32) / 255
    return Moments(
        z_TSK.mean(1),
        jnp.einsum("tsk,tsl->tkl", z_TSK, z_TSK) / z_TSK.shape[1],
        jnp.abs(_laplacian(colours @ _GREY)).mean((1, 2)),
        colours.std((1, 2)).mean(-1),
        colours.mean((1, 2)),
    )


def _laplacian(grey_THW: jax.Array) -> jax.Array:
    middle = grey_THW[:, 1:-1, 1:-1]
    upright = grey_THW[:, :-2, 1:-1] + grey_THW[:, 2:, 1:-1]
    across = grey_THW[:, 1:-1, :-2] + grey_THW[:, 1:-1, 2:]
    return upright + across - 4 * middle


def _patches(frames, xp):
    """uint8 [..., H, W, C] to float32 patches [..., S, 192] in [0, 1]."""
    small = rearrange(frames, "... (h p) (w q) c -> ... (h w) (p q c)", p=PATCH, q=PATCH)
    return small.astype(xp.float32) / 255


def signs(windows: Moments, start: Moments) -> Signs:
    """The signs of every window of `WINDOW` frames, one each `STRIDE`, against `start`."""
    length = windows.first.shape[1]
    size = min(WINDOW, length)
    origin = _gaussian(start)
    ratio = lambda name, part: getattr(part, name).mean(1) / getattr(start, name).mean(1)
    found = []
    for first in range(0, length - size + 1, STRIDE):
        part = Moments(*(x[:, first : first + size] for x in windows))
        colour = np.abs(part.colour.mean(1) - start.colour.mean(1)).mean(-1)
        distance = frechet(*origin, *_gaussian(part))
        found.append(Signs(distance, ratio("sharpness", part), ratio("contrast", part), colour))
    return Signs(*(np.stack(x, axis=1) for x in zip(*found, strict=True)))


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


def frames_to_collapse(beyond_BW: np.ndarray, frames: int) -> np.ndarray:
    """Frames before the first window that is beyond and stays so; `frames` if there is none."""
    followers = WINDOW // STRIDE
    padded = np.pad(beyond_BW, ((0, 0), (0, followers)), mode="edge")
    windows = beyond_BW.shape[1]
    stays = np.all([padded[:, k : k + windows] for k in range(followers + 1)], axis=0)
    return np.where(stays.any(1), stays.argmax(1) * STRIDE, frames)
