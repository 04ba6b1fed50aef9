"""Means over clips with bootstrap intervals (Efron & Tibshirani 1993, chapter 13)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """A mean, and where 95 % of the means of resampled clips lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def of_mean(values_B) -> Interval:
    """The mean of one number for each clip; NaN counts for nothing, and is what nothing gives."""
    mean, low, high = of_means(np.asarray(values_B)[:, None])
    return Interval(float(mean[0]), float(low[0]), float(high[0]))


def of_means(values_BF) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) over clips of every column, float64 [F] each.

    Whole clips are drawn again with replacement, the same ones for every column: the frames of a
    clip are no independent witnesses.
    """
    values = np.asarray(values_BF, np.float64)
    counts = _resampled_counts(len(values))
    present = ~np.isnan(values)
    total = np.where(present, values, 0)
    with np.errstate(invalid="ignore"):
        means = (counts @ total) / (counts @ present)
        mean = total.sum(0) / present.sum(0)
    low, high = _quantiles(means)
    return mean, low, high


def of_ratio(part_B, whole_B) -> Interval:
    """Σ part / Σ whole over clips, such as a share of events, with the interval over clips."""
    part, whole = np.asarray(part_B, np.float64), np.asarray(whole_B, np.float64)
    counts = _resampled_counts(len(part))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, resampled = part.sum() / whole.sum(), (counts @ part) / (counts @ whole)
    low, high = _quantiles(resampled[:, None])
    return Interval(float(ratio), float(low[0]), float(high[0]))


def of_median(values_B) -> Interval:
    """As `of_mean`, of the median."""
    values = np.asarray(values_B, np.float64)
    picks = np.random.default_rng(_SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = _quantiles(np.median(values[picks], axis=1)[:, None])
    return Interval(float(np.median(values)), float(low[0]), float(high[0]))


def of_statistic(statistic: Callable[..., float], *values_B: np.ndarray) -> Interval:
    """As `of_mean`, of any statistic of numbers that belong together, one of each for each clip."""
    columns = [np.asarray(values, np.float64) for values in values_B]
    clips = len(columns[0])
    picks = np.random.default_rng(_SEED).integers(clips, size=(RESAMPLES, clips))
    found = [statistic(*(column[pick] for column in columns)) for pick in picks]
    low, high = _quantiles(np.array(found)[:, None])
    return Interval(float(statistic(*columns)), float(low[0]), float(high[0]))


def _resampled_counts(clips: int) -> np.ndarray:
    """How often each resampling has each clip, float64 [RESAMPLES, clips]."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLES).astype(np.float64)


def _quantiles(means_RF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.full(means_RF.shape[1], np.nan)
    high = low.copy()
    for column, means in enumerate(means_RF.T):
        if (known := means[~np.isnan(means)]).size:
            low[column], high[column] = np.quantile(known, (0.025, 0.975))
    return low, high
