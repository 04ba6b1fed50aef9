"""KVD and FVD: how far generated videos are from real ones, as sets, by the features of I3D.

KVD (kernel video distance) and FVD (Fréchet video distance): Unterthiner et al. 2018,
https://arxiv.org/abs/1812.01717. KVD is the unbiased estimate of the squared maximum mean
discrepancy, here with the kernel (x · y / d + 1)³ of Bińkowski et al. 2018
(https://arxiv.org/abs/1801.01401); FVD is biased upwards, more so for fewer videos.

Both sides are compared with real clips of other levels: generated videos, and the real
continuations of the clips that they start from. The second is the floor.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from cwm_jax.data import clips as clips_of_data
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import drift, generation, held_out, i3d
from cwm_jax.evaluation.generation import Generate
from cwm_jax.evaluation.i3d import I3d

MIN_CLIPS = 256  # fewer do not distinguish a model from copying the last frame
_WITHIN = 1.96  # standard errors to either side, for 95 %


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which videos to compare."""

    clips: int  # generated, and as many real ones of other records
    frames: int = 16  # of each, after the prompt
    n_prompt: int = 4
    split: str = "test"
    seed: int = 0
    batch_size: int = 32
    force: bool = False  # measure with fewer than `MIN_CLIPS`

    def __post_init__(self):
        if self.clips < 2:
            raise UserError(f"--kvd {self.clips}: must be {MIN_CLIPS} or more")
        if self.clips < MIN_CLIPS and not self.force:
            raise UserError(
                f"--kvd {self.clips}: too few clips to distinguish a model from copying the "
                f"last frame; use {MIN_CLIPS} or more, or --force"
            )
        if self.frames < i3d.MIN_FRAMES:
            raise UserError(f"KVD needs videos of {i3d.MIN_FRAMES} frames or more")


class Side(NamedTuple):
    """N clips of a split, each of P + F frames."""

    frames: np.ndarray  # uint8 [N, P + F, H, W, C]
    actions: np.ndarray  # int32 [N, P + F]
    records: np.ndarray  # int [N], of which record each is


def measure(
    generate: Generate, network: I3d, config: DataConfig, plan: Plan, *, watched=False
) -> dict:
    """KVD and FVD of a model and of real clips, see docs/evaluation.md.

    Raises:
        UserError: the split has too few clips.
    """
    ours, others = load(config, plan)
    label = lambda text: text if watched else ""
    settings = dict(seed=plan.seed, batch_size=plan.batch_size, label=label("clips for KVD"))
    given = slice(None, plan.n_prompt)
    videos = generation.in_batches(generate, ours.frames[:, given], ours.actions, **settings)
    seen = [
        i3d.features(network, frames, label=label(f"I3D of {name} clips"))
        for name, frames in (
            ("generated", videos),
            ("their real", ours.frames[:, plan.n_prompt :]),
            ("other real", others.frames[:, plan.n_prompt :]),
        )
    ]
    digest = held_out.digest(np.concatenate([ours.frames, others.frames]), ours.actions)
    return {
        "clips": plan.clips,
        "records": [len(np.unique(side.records)) for side in (ours, others)],
        "frames": plan.frames,
        "given": plan.n_prompt,
        "digest": digest,
        **summary(*seen, ours.records, others.records),
    }


def load(config: DataConfig, plan: Plan) -> tuple[Side, Side]:
    """Two sets of clips from different records, consecutive and without overlap.

    Raises:
        UserError: there are too few.
    """
    length = plan.n_prompt + plan.frames
    episodes = splits.open_episodes(config, plan.split)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(episodes))
    sides = [_places(episodes.lengths, order[i::2], length, rng) for i in range(2)]
    if (fewest := min(map(len, sides))) < plan.clips:
        raise UserError(
            f"--kvd {plan.clips}: {config.dir}/{plan.split} has {fewest} clips of {length} frames "
            f"in one half of its {len(episodes)} records and {max(map(len, sides))} in the other; "
            f"record more, or ask for {fewest}"
        )
    return tuple(_side(episodes, places[: plan.clips], length) for places in sides)


def _places(lengths, records, length: int, rng) -> list[tuple[int, int]]:
    """(record, first frame) of all clips of these records; one clip of each record first."""
    rounds = [
        (turn, int(record), int(place) * length)
        for record in records
        for turn, place in enumerate(rng.permutation(lengths[record] // length))
    ]
    return [(record, start) for _, record, start in sorted(rounds)]


def _side(episodes, places: list[tuple[int, int]], length: int) -> Side:
    places = sorted(places)  # each record is decoded once
    batch = clips_of_data.cut(episodes, places, length)
    return Side(batch["frames"], batch["actions"], np.array([record for record, _ in places]))


def summary(generated_Nd, real_Nd, other_Md, records_N, other_records_M) -> dict:
    """KVD and FVD of two sets of features, each against a third.

    Args:
        generated_Nd, real_Nd: features of generated videos and of the real ones that they continue.
        other_Md: features of real videos of other records.
        records_N, other_records_M: to which record each belongs; clips of a record are correlated,
            so intervals are those of the jackknife that leaves out whole records.
    """
    records = np.asarray(records_N), np.asarray(other_records_M)
    model, floor = (_kernels(x, other_Md, *records) for x in (generated_Nd, real_Nd))
    statistics = {
        "model": lambda *kept: _discrepancy(model, *kept),
        "floor": lambda *kept: _discrepancy(floor, *kept),
        "model_minus_floor": lambda *kept: _discrepancy(model, *kept) - _discrepancy(floor, *kept),
    }
    kvd = {name: _interval(statistic, *records) for name, statistic in statistics.items()}
    fvd = {
        "model": frechet_distance(generated_Nd, other_Md),
        "floor": frechet_distance(real_Nd, other_Md),
    }
    return {"kvd": kvd, "fvd": fvd}


def kernel_distance(x_Nd: np.ndarray, y_Md: np.ndarray) -> float:
    """The unbiased estimate of MMD² of independent videos; may be below 0 for similar sets."""
    kernels = _kernels(x_Nd, y_Md, np.arange(len(x_Nd)), np.arange(len(y_Md)))
    return _discrepancy(kernels, np.ones(len(x_Nd)), np.ones(len(y_Md)))


class _Kernels(NamedTuple):
    """Values of the kernel between pairs, and which pairs of a set are of different records.

    Only those count: clips of one record are more similar than average, and would bias MMD².
    """

    xx: np.ndarray  # [N, N]
    yy: np.ndarray  # [M, M]
    xy: np.ndarray  # [N, M]
    apart_x: np.ndarray  # 1 or 0, [N, N]
    apart_y: np.ndarray  # [M, M]


def _kernels(x_Nd, y_Md, records_N: np.ndarray, records_M: np.ndarray) -> _Kernels:
    x, y = (np.asarray(side, np.float64) for side in (x_Nd, y_Md))
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    apart = [(r[:, None] != r).astype(np.float64) for r in (records_N, records_M)]
    return _Kernels(kernel(x, x) * apart[0], kernel(y, y) * apart[1], kernel(x, y), *apart)


def _discrepancy(kernels: _Kernels, kept_N: np.ndarray, kept_M: np.ndarray) -> float:
    """MMD² of the videos that are kept (1; left out: 0); NaN if a side is of one record."""
    mean = lambda values, pairs, kept: (kept @ values @ kept) / (kept @ pairs @ kept)
    with np.errstate(invalid="ignore"):
        alike_x = mean(kernels.xx, kernels.apart_x, kept_N)
        alike_y = mean(kernels.yy, kernels.apart_y, kept_M)
    between = kept_N @ kernels.xy @ kept_M / (kept_N.sum() * kept_M.sum())
    return float(alike_x + alike_y - 2 * between)


def _interval(statistic, records_N: np.ndarray, records_M: np.ndarray) -> dict[str, float]:
    """A statistic of both sides with its jackknife interval over whole records."""
    everything = np.ones(len(records_N)), np.ones(len(records_M))
    mean, variance = statistic(*everything), 0.0
    for side, records in enumerate((records_N, records_M)):
        groups, without = np.unique(records), []
        for group in groups:
            kept = list(everything)
            kept[side] = (records != group).astype(float)
            without.append(statistic(*kept))
        variance += float(np.var(without)) * (len(groups) - 1)
    error = _WITHIN * variance**0.5
    return {"mean": mean, "low": mean - error, "high": mean + error}


def frechet_distance(x_Nd: np.ndarray, y_Md: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians with the moments of two sets of features."""
    moments = []
    for side in (x_Nd, y_Md):
        side = np.asarray(side, np.float64)
        moments += [side.mean(0), np.cov(side, rowvar=False)]
    return float(drift.frechet(*moments))
