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
from cwm_jax.data import loader, splits
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

PROBED = 31  # frames whose actions are read back: they fit the window of the original


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and on which clips."""

    split: str = "test"
    clips: int = 0  # 0: all records that are long enough
    horizon: int = 120  # frames after the prompt
    n_prompt: tuple[int, ...] = (1, 4)  # control and drift start from the first
    drift_frames: int = 500
    seed: int = 0  # of all noise and of the random actions
    batch_size: int = 32  # clips generated at a time
    seeds: int = 4  # over which the spread of generated frames is taken; 0: no uncertainty
    single_step: bool = True  # whether single steps are measured, on all clips of the split

    def __post_init__(self):
        for name, least in (("horizon", 2), ("drift_frames", drift.WINDOW), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        check_seed(self.seed)
        if self.seeds and self.seeds < 2:
            raise UserError(f"seeds={self.seeds}: a spread needs 2 or more; 0 omits it")
        if self.clips < 0:
            raise UserError(f"--clips {self.clips}: must be 0 (all that are long enough) or more")
        if min(self.n_prompt) < 1:
            raise UserError(f"--n-prompt {min(self.n_prompt)}: must be 1 or more")
        if self.drift_frames < self.horizon:
            raise UserError(
                f"drift_frames={self.drift_frames} is less than horizon={self.horizon}: control "
                "over the horizon uses the random actions of the long rollouts"
            )

    @property
    def frames(self) -> int:
        """The number of frames that a record must have."""
        return max(max(self.n_prompt) + self.horizon, 2 * drift.WINDOW)


class Rollouts(NamedTuple):
    """All frames generated for a plan, uint8 [B, F, H, W, C], and the clips to compare with."""

    clips: HeldOut
    true: dict[int, np.ndarray]  # by length of the prompt: under the actions really taken
    random_actions: np.ndarray  # int32 [B, n_prompt + drift_frames]
    random: np.ndarray  # under these, `drift_frames` long


class Measured(NamedTuple):
    """The numbers, and the frames and scores for the pictures."""

    results: dict
    rollouts: Rollouts
    scores: Scores  # under true actions, from the first length of prompt
    unsure: Maps | None = None  # its uncertainty, from the same prompt


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
        sampler: generates with this network and these parameters.
        config: the data; the probe is trained on its train split.
        probes: folder where trained probes are kept.
        lpips: its network; without it LPIPS is left out.
        watched: show progress on the terminal.

    Raises:
        UserError: for data or a network that cannot be measured.
    """
    generation.check_game(network)
    lengths = splits.open_episodes(config, plan.split).lengths
    check_memory(plan.clips or int((lengths >= plan.frames).sum()), plan)
    clips = held_out.load(
        config, plan.split, frames=plan.frames, up_to=drift.REAL, clips=plan.clips
    )
    reader = probe.cached(config, probes)
    generated = generate_all(generation.by_sampler(sampler), clips, plan, watched=watched)
    scored = slice(max(plan.n_prompt) + plan.horizon)
    rendered = rollout_quality.reconstruction(
        network, params, clips.frames[:, scored], clips.actions[:, scored]
    )
    measured = judge(generated, plan, rendered=rendered, reader=reader, lpips=lpips)
    if plan.seeds:
        maps = _uncertainty(network, sampler, clips, plan, watched=watched)
        measured.results["uncertainty"] = uncertainty.summary(maps, seeds=plan.seeds)
        measured = measured._replace(unsure=maps)
    if plan.single_step:
        measured.results["single_step"] = _single_step(network, params, config, plan)
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


def _single_step(network: DiTConfig, params: Params, config: DataConfig, plan: Plan) -> dict:
    batches = loader.eval_batches(
        config, plan.split, batch_size=_whole_batch(plan.batch_size), num_actions=NUM_ACTIONS
    )
    return dict(single_step.epoch_end(network, params, batches, sharding.make_mesh()))


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
    """Raises a UserError if the frames of a plan do not fit into memory (bytes; this machine's).

    Counted are 1.5 times all frames, since rollouts are concatenated from batches, the statistics
    that drift keeps of each long rollout, and the float copies for the uncertainty.
    """
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    frames = drift.REAL + plan.frames + len(plan.n_prompt) * plan.horizon + plan.drift_frames
    kept = (drift.REAL + plan.drift_frames) * 8 * drift.FEATURES**2
    unsure = min(plan.horizon, uncertainty.FRAMES) * 5 * 4 if plan.seeds else 0  # float32
    per_clip = (1.5 * frames + unsure) * math.prod(FRAME_SHAPE) + kept
    if clips * per_clip > memory:
        raise UserError(
            f"{clips} clips need {clips * per_clip / 1e9:.1f} GB of memory to measure, and this "
            f"machine has {memory / 1e9:.1f}: use --clips {int(memory // per_clip)} or fewer"
        )


def _whole_batch(size: int) -> int:
    """`size`, rounded up to a multiple of the number of devices."""
    return math.ceil(size / jax.device_count()) * jax.device_count()


def generate_all(
    generate: generation.Generate, clips: HeldOut, plan: Plan, *, watched: bool = False
) -> Rollouts:
    """Generates all rollouts that a plan needs: the longest of each kind, once."""

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
    generated: Rollouts,
    plan: Plan,
    *,
    rendered: np.ndarray,
    reader: Probe,
    lpips: Lpips | None = None,
) -> Measured:
    """All numbers about generated frames.

    Args:
        rendered: the reconstruction of the real clips, uint8 [B, T, H, W, C].
        lpips: its network; without it LPIPS is left out.
    """
    clips, horizons = generated.clips, rollout_quality.horizons_to(plan.horizon)
    rollout, kept = {}, None
    for given in plan.n_prompt:
        span = slice(given, given + plan.horizon)
        prompt, real = clips.frames[:, :given], clips.frames[:, span]
        candidates = {
            "model": generated.true[given],
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
    random = score(generated.random[:, : plan.horizon], real, prompt[:, -1])
    read = min(PROBED, plan.horizon)
    begun = lambda frames: np.concatenate([prompt[:, -1:], frames[:, :read]], axis=1)
    actions = clips.actions[:, given - 1 : given + read]
    results = {
        "clips": {"used": len(clips), "records": clips.records, "too_short": clips.too_short},
        "rollout": rollout,
        "control": controllability.delta_psnr(kept, random, horizons),
        "probe": probe_accuracy.summary(reader, begun(generated.true[given]), begun(real), actions),
        "drift": drift.summary(generated.random, clips.frames, lpips=lpips),
    }
    return Measured(results, generated, kept)


def _quality(scored: Mapping[str, Scores], horizons: Sequence[int]) -> dict:
    """Means of the model and its floors, and the model minus floors, clip by clip."""
    model, *floors = (paired.by_clip(scored[name], horizons) for name in ("model", *paired.FLOORS))
    minus = [paired.difference(model, floor) for floor in floors]
    return {name: rollout_quality.summary(scores, horizons) for name, scores in scored.items()} | {
        "model_minus": dict(zip(paired.FLOORS, minus, strict=True)),
        "by_clip": model,
    }


def write_json(path: Path, results: Mapping) -> None:
    """Writes results as `as_json` formats them."""
    with written_whole(path) as temporary:
        temporary.write_text(as_json(results) + "\n", encoding="utf-8")


def as_json(results: Mapping) -> str:
    """Results as JSON; NaN and infinity, which it lacks, become null."""
    return json.dumps(_plain(results), indent=1, allow_nan=False)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
