"""Differences of two measurements of the same clips, and where LPIPS ranks them differently.

Clips differ far more from each other than two ways of generating them do, so the difference is
computed clip by clip, and its interval is that of the mean of these differences.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cwm_jax.evaluation import bootstrap, rollout_quality
from cwm_jax.evaluation.frame_scores import Scores

NAMES = {"psnr": "PSNR", "ssim": "SSIM", "psnr_motion": "PSNR of motion", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 3, "psnr_motion": 2, "lpips": 3}
FLOORS = {"copy_last": "copying the last frame", "blur": "blurred real frames"}
_LOWER_IS_BETTER = {"lpips"}

ByClip = Mapping[str, Mapping[str, Sequence[float | None]]]  # measure → horizon → one a clip
Differences = dict[str, dict[str, dict[str, float]]]  # measure → horizon → mean, low, high


def by_clip(scores: Scores, horizons: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """For each measure and horizon h, the mean over frames 1…h of every clip."""
    means = lambda x, h: rollout_quality.clip_means(rollout_quality.capped(x)[:, :h]).tolist()
    return {
        name: {str(h): means(values, h) for h in horizons}
        for name, values in scores.measured().items()
    }


def difference(one: ByClip, other: ByClip) -> Differences:
    """`one` minus `other`, of all measures and horizons that both have."""
    return {
        name: {
            h: rollout_quality.as_dict(
                *bootstrap.of_mean(_floats(values) - _floats(other[name][h]))
            )
            for h, values in horizons.items()
            if h in other[name]
        }
        for name, horizons in one.items()
        if name in other
    }


def contradictions(
    found: Differences, horizons: Sequence[str], *, one: str, other: str
) -> Iterator[str]:
    """A sentence for each horizon at which a measure and LPIPS prefer different sides.

    Args:
        found: `one` minus `other`.
    """
    if "lpips" not in found:
        return
    for h in horizons:
        at = {name: values[h] for name, values in found.items() if h in values}
        wanted = _preference("lpips", at["lpips"])
        against = [name for name in at if wanted * _preference(name, at[name]) < 0]
        if not against:
            continue
        better, worse = (one, other) if wanted > 0 else (other, one)
        certain = all(_is_certain(at[name]) for name in (*against, "lpips"))
        differ = ", ".join(_difference(name, at[name]) for name in ("lpips", *against))
        yield (
            f"frames 1…{h}: LPIPS ranks {better} above {worse}, "
            f"{', '.join(NAMES[name] for name in against)} in the opposite order "
            f"({one} minus {other}: {differ}{'' if certain else '; an interval contains 0'})"
        )


def _preference(name: str, interval: Mapping[str, float]) -> int:
    """1 where the first side is better, −1 where the second is, 0 where neither (or NaN)."""
    mean = interval["mean"] or 0.0  # None: NaN in a file
    sign = (mean > 0) - (mean < 0)
    return -sign if name in _LOWER_IS_BETTER else sign


def _is_certain(interval: Mapping[str, float]) -> bool:
    return interval["low"] > 0 or interval["high"] < 0


def _difference(name: str, interval: Mapping[str, float]) -> str:
    mean, low, high = (f"{interval[x]:+.{DIGITS[name]}f}" for x in ("mean", "low", "high"))
    return f"{NAMES[name]} {mean} [{low}, {high}]"


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, np.float64)  # None, which stands for NaN in a file, becomes NaN
