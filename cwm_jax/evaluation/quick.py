"""The quick form, for training: a short rollout on a few clips, under `eval/…` names.

The same scores as in the full form, on fewer clips and without intervals: enough to see a run
improve, too coarse to compare runs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.evaluation import controllability, generation, held_out, rollout_quality
from cwm_jax.evaluation.frame_scores import Scores, score
from cwm_jax.evaluation.generation import Generate
from cwm_jax.evaluation.lpips import Lpips


class Quick(NamedTuple):
    """Clips of T frames, the first given, and random actions for a second rollout."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    actions: np.ndarray  # int32 [B, T]
    random_actions: np.ndarray  # int32 [B, T]
    copy_last: Scores
    seed: int
    lpips: Lpips | None


def prepare(
    config: DataConfig,
    split: str,
    *,
    clips: int,
    frames: int,
    num_actions: int,
    seed: int,
    lpips: Lpips | None = None,
) -> Quick:
    """Loads the clips, the same ones throughout a run: as many as requested, or as available.

    The records are evenly spaced over the split. Without `lpips`, LPIPS is left out.

    Raises:
        UserError: no record has `frames` + 1 frames, or a bad one may not be skipped.
    """
    episodes = splits.open_episodes(config, split, num_actions=num_actions)
    eligible = held_out.long_enough(episodes, config, split, frames=frames + 1)
    spread = eligible[:: max(1, len(eligible) // clips)][:clips].tolist()
    chosen = splits.good_episodes(config, episodes, spread, length=frames + 1)
    batch = splits.load_clips(episodes, chosen, length=frames + 1)
    real, actions = batch["frames"], batch["actions"]
    random = controllability.random_actions(
        actions, n_prompt=1, frames=frames, seed=seed, num_actions=num_actions
    )
    copied = rollout_quality.copy_last(real[:, :1], frames)
    floor = score(copied, real[:, 1:], real[:, 0], lpips=lpips)
    return Quick(real, actions, random, floor, seed, lpips)


def run(generate: Generate, quick: Quick) -> Iterator[tuple[str, float]]:
    """Yields means over clips and frames: PSNR (dB), SSIM, motion's PSNR, LPIPS, ΔPSNR, floors."""

    def scored(actions, lpips: Lpips | None = None) -> Scores:
        batch = dict(seed=quick.seed, batch_size=len(actions))
        frames = generation.in_batches(generate, quick.frames[:, :1], actions, **batch)
        return score(frames, quick.frames[:, 1:], quick.frames[:, 0], lpips=lpips)

    true, random = scored(quick.actions, quick.lpips), scored(quick.random_actions)
    yield from _means("eval/", true)
    yield from _means("eval/copy_last_", quick.copy_last)
    both = (rollout_quality.capped(scores.psnr).mean() for scores in (true, random))
    yield "eval/delta_psnr", float(np.subtract(*both))


def _means(prefix: str, scores: Scores) -> Iterator[tuple[str, float]]:
    for name, values in scores.measured().items():
        known = rollout_quality.capped(values)[~np.isnan(values)]
        if known.size:
            yield prefix + name, float(known.mean())
