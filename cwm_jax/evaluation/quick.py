"""The quick form, for training: a short rollout on a few clips, under `eval/…` names.

The same scores as in the full form, on fewer clips and without intervals: good for seeing a run
improve, too coarse for comparing runs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cwm_jax.data import DataConfig
from cwm_jax.evaluation import control, drawing, held_out, quality
from cwm_jax.evaluation.drawing import Draw
from cwm_jax.evaluation.scores import Scores, score


class Quick(NamedTuple):
    """Clips of T frames, the first given, and random actions to draw them under once more."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    actions: np.ndarray  # int32 [B, T]
    random_actions: np.ndarray  # int32 [B, T]
    copy_last: Scores
    seed: int


def prepare(
    config: DataConfig, split: str, *, clips: int, frames: int, num_actions: int, seed: int
) -> Quick:
    """Loads the clips, the same for a run's whole life: as many as asked for, or as there are.

    Raises:
        UserError: where no record has `frames` + 1 frames.
    """
    held = held_out.load(config, split, frames=frames + 1, num_actions=num_actions)
    few = slice(None, None, max(1, len(held) // clips))
    real, actions = held.frames[few][:clips].copy(), held.actions[few][:clips].copy()
    random = control.random_actions(
        actions, n_prompt=1, frames=frames, seed=seed, num_actions=num_actions
    )
    still = quality.copy_last(real[:, :1], frames)
    return Quick(real, actions, random, score(still, real[:, 1:], real[:, 0]), seed)


def run(draw: Draw, quick: Quick) -> Iterator[tuple[str, float]]:
    """Yields means over clips and frames: PSNR (dB), SSIM, motion's PSNR, ΔPSNR, and the floors."""

    def scored(actions) -> Scores:
        batch = dict(seed=quick.seed, batch_size=len(actions))
        frames = drawing.in_batches(draw, quick.frames[:, :1], actions, **batch)
        return score(frames, quick.frames[:, 1:], quick.frames[:, 0])

    true, random = scored(quick.actions), scored(quick.random_actions)
    yield from _means("eval/", true)
    yield from _means("eval/copy_last_", quick.copy_last)
    both = (quality.capped(scores.psnr).mean() for scores in (true, random))
    yield "eval/delta_psnr", float(np.subtract(*both))


def _means(prefix: str, scores: Scores) -> Iterator[tuple[str, float]]:
    for name, values in scores._asdict().items():
        known = quality.capped(values)[~np.isnan(values)]
        if known.size:
            yield prefix + name, float(known.mean())
