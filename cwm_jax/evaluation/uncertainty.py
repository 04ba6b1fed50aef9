"""Whether a model's uncertainty predicts its errors.

Two measures are available while a model generates (Hansen & Wang 2026, "Hallucination in World
Models is Predictable and Preventable", https://arxiv.org/abs/2606.27326), here for each patch of
each frame: the spread of frames generated from other seeds, and the instability of the denoising.
They are compared with the error of a rollout from the game's own frames, by rank correlation, and
with a measure that needs no computation: the model's own change of the patch from frame to frame.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import einops
import numpy as np

from cwm_jax.evaluation import bootstrap, generation, rollout_quality
from cwm_jax.evaluation.generation import Generate
from cwm_jax.sampling.sampler import Sampler

FRAMES = 32  # of a rollout, at most
SIGNS = ("spread", "instability", "change")


class Maps(NamedTuple):
    """Root mean squares over each patch, in colours of 0…255: float32 [B, F, h, w]."""

    spread: np.ndarray  # standard deviation between seeds other than the first
    instability: np.ndarray | None  # of the first seed's denoising; None: it has a single step
    change: np.ndarray  # of the first seed's frame from the one before it
    error: np.ndarray  # of the first seed's frame from the real one

    def signs(self) -> dict[str, np.ndarray]:
        """The measures that may predict the error, by name."""
        found = {name: getattr(self, name) for name in SIGNS}
        return {name: values for name, values in found.items() if values is not None}


def measure(
    generate: Generate,
    sampler: Sampler | None,
    real_BTHWC: np.ndarray,
    actions_BT: np.ndarray,
    *,
    n_prompt: int,
    patch: int,
    seeds: int,
    seed: int,
    batch_size: int,
    label: str = "",
) -> Maps:
    """Generates the frames after the prompt `seeds` + 1 times, under the recorded actions.

    Args:
        sampler: the sampler of `generate` if its denoising steps are accessible; else None.
        patch: pixels on a side.
        seeds: number of seeds for the spread, 2 or more.
        label: of progress bars; None shows none.
    """
    settings = dict(batch_size=batch_size)
    again = lambda generate, k: generation.in_batches(
        generate,
        real_BTHWC[:, :n_prompt],
        actions_BT,
        seed=(seed + k) % 2**32,
        label=label and f"{label}, seed {k}",
        **settings,
    )
    instability = None
    if sampler is None:
        first = again(generate, 0)
    else:
        first, instability = again(generation.watched_by_sampler(sampler), 0)
        instability = instability if len(sampler.config.levels) > 1 else None
    others = (again(generate, k) for k in range(1, seeds + 1))
    real = real_BTHWC[:, n_prompt:]
    before = np.concatenate([real_BTHWC[:, n_prompt - 1 : n_prompt], first[:, :-1]], axis=1)
    return Maps(
        spread=np.sqrt(_by_patch(_variance(others), patch)),
        instability=instability,
        change=np.sqrt(_by_patch(_squared(first, before), patch)),
        error=np.sqrt(_by_patch(_squared(first, real), patch)),
    )


def _squared(a, b) -> np.ndarray:
    return np.square(a.astype(np.float32) - b)


def _variance(frames) -> np.ndarray:
    """The unbiased variance of each pixel over an iterable of equally many frames."""
    for count, x in enumerate(frames, start=1):  # Welford's, which keeps two arrays
        x = x.astype(np.float32)
        if count == 1:
            mean, total = x, np.zeros_like(x)
        else:
            off = x - mean
            mean = mean + off / count
            total += off * (x - mean)
    return total / (count - 1)


def _by_patch(values_BFHWC: np.ndarray, patch: int) -> np.ndarray:
    axes = "b f (h p) (w q) c -> b f h w"
    return einops.reduce(values_BFHWC, axes, "mean", p=patch, q=patch)


def summary(maps: Maps, *, seeds: int) -> dict:
    """Each measure and the error by time and by patch, and the rank correlations.

    Rank correlations (Spearman), 1: a perfect order, 0: none; means over clips with intervals:

    where   over the patches of a frame, mean over frames: where in the picture is it wrong?
    beyond  as `where`, with the model's own change held fixed (partial correlation)
    when    over the frames of a clip
    which   over clips; its interval is over resampled clips
    """
    error, change = maps.error, maps.change
    found = {"seeds": seeds, "frames": error.shape[1], "error": _curves(error)}
    for name, sign in maps.signs().items():
        correlations = {
            "where": _of_clips(_patches, sign, error),
            "when": _of_clips(_frames, sign, error),
            "which": _which(sign, error),
        }
        if name != "change":
            correlations["beyond"] = _of_clips(_patches_beyond, sign, error, change)
        found[name] = _curves(sign) | correlations
    return found


def _curves(values_BFhw: np.ndarray) -> dict:
    """Means by frame with intervals, and by patch."""
    by_frame = rollout_quality.series(*bootstrap.of_means(_rms(values_BFhw, (2, 3))))
    return {"by_frame": by_frame, "by_patch": _rms(values_BFhw, (0, 1)).tolist()}


def _rms(values: np.ndarray, axes) -> np.ndarray:
    return np.sqrt(np.square(values, dtype=np.float64).mean(axes))


def _of_clips(correlation: Callable, *maps_BFhw: np.ndarray) -> dict[str, float]:
    per_clip = [correlation(*clip) for clip in zip(*maps_BFhw, strict=True)]
    return rollout_quality.as_dict(*bootstrap.of_mean(per_clip))


def _patches(sign_Fhw, error_Fhw) -> float:
    return _mean(spearman(*_flat(sign_Fhw, error_Fhw)))


def _patches_beyond(sign_Fhw, error_Fhw, change_Fhw) -> float:
    sign, error, change = _flat(sign_Fhw, error_Fhw, change_Fhw)
    to_error, to_change = spearman(sign, error), spearman(sign, change)
    of_change = spearman(change, error)
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = np.sqrt((1 - to_change**2) * (1 - of_change**2))
        return _mean((to_error - to_change * of_change) / rest)


def _frames(sign_Fhw, error_Fhw) -> float:
    return float(spearman(*(_rms(x, (1, 2)) for x in (sign_Fhw, error_Fhw))))


def _which(sign_BFhw, error_BFhw) -> dict[str, float]:
    clips = [_rms(x, (1, 2, 3)) for x in (sign_BFhw, error_BFhw)]
    return rollout_quality.as_dict(*bootstrap.of_statistic(spearman, *clips))


def _flat(*maps: np.ndarray) -> list[np.ndarray]:
    return [x.reshape(len(x), -1) for x in maps]


def _mean(values: np.ndarray) -> float:
    """Means without NaN; NaN if there is nothing else."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis; NaN if one side is constant."""
    from scipy import stats  # takes half a second to import

    a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))


def best_sign(found: Mapping) -> str:
    """The measure that best predicts where a frame is wrong."""
    known = [name for name in SIGNS if name in found and name != "change"]
    return max(known, key=lambda name: found[name]["where"]["mean"])
