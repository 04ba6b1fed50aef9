"""The whole measurement of a checkpoint, in the order in which it is reported."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data import loader
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import (
    controllability,
    drift,
    generation,
    held_out,
    paired,
    probe,
    probe_accuracy,
    protocol,
    rollout_quality,
    single_step,
    uncertainty,
)
from cwm_jax.evaluation.frame_scores import Scores, score
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.evaluation.probe import Probe
from cwm_jax.evaluation.uncertainty import Maps
from cwm_jax.files import written_whole
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.runtime import sharding
from cwm_jax.sampling.generator import Generator
from cwm_jax.sampling.sampler import Sampler, check_seed

PROBED = 31  # frames whose actions are read back: what fits the window of the original


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    split: str = "test"
    clips: int = 0  # 0: all records that are long enough
    horizon: int = 120  # frames after the prompt
    n_prompt: tuple[int, ...] = (1, 4)  # the first is the one that control and drift start from
    drift_frames: int = 500
    seed: int = 0  # of all noise and of the random actions
    batch_size: int = 32  # clips drawn at a time
    seeds: int = 4  # over which the spread of generated frames is taken; 0: no uncertainty

    def __post_init__(self):
        for name, least in (("horizon", 2), ("drift_frames", drift.WINDOW), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        check_seed(self.seed)
        if self.seeds and self.seeds < 2:
            raise UserError(f"seeds={self.seeds}: a spread needs 2 or more; 0 leaves it out")
        if min(self.n_prompt) < 1 or self.clips < 0:
            raise UserError(f"n_prompt={self.n_prompt}, clips={self.clips}: need at least one")
        if self.drift_frames < self.horizon:
            raise UserError(
                f"drift_frames={self.drift_frames} is less than horizon={self.horizon}: the random "
                "actions of the long rollouts serve for the control over the horizon too"
            )

    @property
    def frames(self) -> int:
        """Frames that a record must have."""
        return max(max(self.n_prompt) + self.horizon, 2 * drift.WINDOW)


class Rollouts(NamedTuple):
    """Everything drawn for a plan, uint8 [B, F, H, W, C], and what it is held against."""

    clips: HeldOut
    true: dict[int, np.ndarray]  # by length of the prompt: under the actions really taken
    random_actions: np.ndarray  # int32 [B, n_prompt + drift_frames]
    random: np.ndarray  # under these, `drift_frames` long


class Measured(NamedTuple):
    """The numbers, and the frames and scores that pictures are made of."""

    results: dict
    rollouts: Rollouts
    scores: Scores  # under true actions, from the first length of prompt
    unsure: Maps | None = None  # what it is unsure of, from the same prompt


def measure(
    network: DiTConfig,
    params: Params,
    sampler: Generator,
    config: DataConfig,
    plan: Plan,
    *,
    probes: Path,
    lpips: Lpips | None = None,
    watched: bool = False,
) -> Measured:
    """Measures a network; the numbers are described in docs/evaluation.md.

    Args:
        sampler: draws with this network and these parameters.
        config: where clips come from; the probe learns on its train split.
        probes: folder where trained probes are kept.
        lpips: its network; LPIPS is left out without.
        watched: somebody waits at a terminal: show progress.

    Raises:
        UserError: for data or a network that cannot be measured so.
    """
    generation.check_game(network)
    lengths = loader.open_episodes(config, plan.split).lengths
    check_memory(plan.clips or int((lengths >= plan.frames).sum()), plan)
    clips = held_out.load(
        config, plan.split, frames=plan.frames, up_to=drift.REAL, clips=plan.clips
    )
    reader = probe.cached(config, probes)
    drawn = draw_all(generation.by_sampler(sampler), clips, plan, watched=watched)
    scored = slice(max(plan.n_prompt) + plan.horizon)
    rendered = rollout_quality.reconstruction(
        network, params, clips.frames[:, scored], clips.actions[:, scored]
    )
    measured = judge(drawn, plan, rendered=rendered, reader=reader, lpips=lpips)
    if plan.seeds:
        maps = _uncertainty(network, sampler, clips, plan, watched=watched)
        measured.results["uncertainty"] = uncertainty.summary(maps, seeds=plan.seeds)
        measured = measured._replace(unsure=maps)
    mesh = sharding.make_mesh()
    batches = loader.eval_batches(
        config, plan.split, batch_size=_whole_batch(plan.batch_size), num_actions=NUM_ACTIONS
    )
    measured.results["single_step"] = dict(single_step.epoch_end(network, params, batches, mesh))
    conditions = protocol.of(
        clips,
        sampler.config,
        split=plan.split,
        horizons=rollout_quality.horizons_to(plan.horizon),
        n_prompt=plan.n_prompt,
        drift_frames=plan.drift_frames,
        seed=plan.seed,
        batch_size=plan.batch_size,
        probe=reader.name,
        sharpness=network.warp_sharpness,
    )
    measured.results["protocol"] = conditions.as_dict()
    return measured


def _uncertainty(
    network: DiTConfig, sampler: Generator, clips: HeldOut, plan: Plan, *, watched: bool
) -> Maps:
    given = plan.n_prompt[0]
    span = slice(given + min(plan.horizon, uncertainty.FRAMES))
    return uncertainty.measure(
        generation.by_sampler(sampler),
        sampler if isinstance(sampler, Sampler) else None,
        clips.frames[:, span],
        clips.actions[:, span],
        n_prompt=given,
        patch=network.patch_size,
        seeds=plan.seeds,
        seed=plan.seed,
        batch_size=plan.batch_size,
        label="uncertainty" if watched else "",
    )


def check_memory(clips: int, plan: Plan, *, memory: float | None = None) -> None:
    """Raises a UserError where the frames of a plan do not fit into memory (bytes; this machine's).

    Half as much again as all frames, since rollouts are put together from their batches, what
    drift keeps of each frame of the long ones, and the float copies of the uncertainty.
    """
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    frames = drift.REAL + plan.frames + len(plan.n_prompt) * plan.horizon + plan.drift_frames
    kept = (drift.REAL + plan.drift_frames) * 8 * drift.FEATURES**2
    unsure = min(plan.horizon, uncertainty.FRAMES) * 5 * 4 if plan.seeds else 0  # float32
    per_clip = (1.5 * frames + unsure) * math.prod(FRAME_SHAPE) + kept
    if clips * per_clip > memory:
        raise UserError(
            f"{clips} clips need {clips * per_clip / 1e9:.1f} GB of memory to measure, and this "
            f"machine has {memory / 1e9:.1f}: ask for --clips {int(memory // per_clip)} or fewer"
        )


def _whole_batch(size: int) -> int:
    """`size`, rounded up to what can be shared out over all devices."""
    return math.ceil(size / jax.device_count()) * jax.device_count()


def draw_all(
    generate: generation.Generate, clips: HeldOut, plan: Plan, *, watched: bool = False
) -> Rollouts:
    """Draws everything that a plan needs: the longest rollout of each kind, once."""

    def batches(actions, given: int, label: str):
        settings = dict(seed=plan.seed, batch_size=plan.batch_size)
        prompt, label = clips.frames[:, :given], label if watched else ""
        return generation.in_batches(generate, prompt, actions, label=label, **settings)

    true = {
        given: batches(
            clips.actions[:, : given + plan.horizon], given, f"true actions, {given} given"
        )
        for given in plan.n_prompt
    }
    given = plan.n_prompt[0]
    actions = controllability.random_actions(
        clips.actions, n_prompt=given, frames=plan.drift_frames, seed=plan.seed
    )
    return Rollouts(clips, true, actions, batches(actions, given, "random actions"))


def judge(
    drawn: Rollouts,
    plan: Plan,
    *,
    rendered: np.ndarray,
    reader: Probe,
    lpips: Lpips | None = None,
) -> Measured:
    """All numbers about drawn frames.

    Args:
        rendered: the reconstruction of the real clips, uint8 [B, T, H, W, C].
        lpips: its network; LPIPS is left out without.
    """
    clips, horizons = drawn.clips, rollout_quality.horizons_to(plan.horizon)
    rollout, kept = {}, None
    for given in plan.n_prompt:
        span = slice(given, given + plan.horizon)
        prompt, real = clips.frames[:, :given], clips.frames[:, span]
        candidates = {
            "model": drawn.true[given],
            "copy_last": rollout_quality.copy_last(prompt, plan.horizon),
            "reconstruction": rendered[:, span],
            "blur": rollout_quality.blurred(real),
        }
        scored = {
            name: score(frames, real, prompt[:, -1], lpips=lpips)
            for name, frames in candidates.items()
        }
        rollout[f"prompt_{given}"] = _quality(scored, horizons)
        kept = kept or scored["model"]
    given = plan.n_prompt[0]
    prompt = clips.frames[:, :given]
    real = clips.frames[:, given : given + plan.horizon]
    random = score(drawn.random[:, : plan.horizon], real, prompt[:, -1])
    read = min(PROBED, plan.horizon)
    begun = lambda frames: np.concatenate([prompt[:, -1:], frames[:, :read]], axis=1)
    actions = clips.actions[:, given - 1 : given + read]
    results = {
        "clips": {"used": len(clips), "records": clips.records, "too_short": clips.too_short},
        "rollout": rollout,
        "control": controllability.delta_psnr(kept, random, horizons),
        "probe": probe_accuracy.summary(reader, begun(drawn.true[given]), begun(real), actions),
        "drift": drift.summary(drawn.random, clips.frames, lpips=lpips),
    }
    return Measured(results, drawn, kept)


def _quality(scored: Mapping[str, Scores], horizons: Sequence[int]) -> dict:
    """Means of the model and what it stands beside, and the model minus floors, clip by clip."""
    model, *floors = (paired.by_clip(scored[name], horizons) for name in ("model", *paired.FLOORS))
    minus = [paired.difference(model, floor) for floor in floors]
    return {name: rollout_quality.summary(scores, horizons) for name, scores in scored.items()} | {
        "model_minus": dict(zip(paired.FLOORS, minus, strict=True)),
        "by_clip": model,
    }


def write_json(path: Path, results: Mapping) -> None:
    """Writes results; JSON has neither NaN nor infinity, which become null."""
    with written_whole(path) as temporary:
        temporary.write_text(
            json.dumps(_plain(results), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def _plain(value):
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
