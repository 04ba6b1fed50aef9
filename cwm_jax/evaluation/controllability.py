"""Controllability: ΔPSNR.

PSNR under the actions really taken, minus PSNR under random ones, from the same prompt and with
the same noise (Bruce et al. 2024, https://arxiv.org/abs/2402.15391, §3, at every horizon instead
of the fourth frame only). A model that ignores its actions has 0.
"""

from collections.abc import Sequence

import numpy as np

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.evaluation import rollout_quality
from cwm_jax.evaluation.frame_scores import Scores


def random_actions(
    actions_BT: np.ndarray, *, n_prompt: int, frames: int, seed: int, num_actions: int = NUM_ACTIONS
) -> np.ndarray:
    """The prompt's actions, then `frames` uniform random ones: int32 [B, n_prompt + frames]."""
    # A column for each frame, so that a longer script starts with the same actions as a shorter.
    rng = np.random.default_rng(seed)
    sampled = rng.integers(num_actions, size=(frames, len(actions_BT)), dtype=np.int32).T
    return np.concatenate([actions_BT[:, :n_prompt], sampled], axis=1)


def delta_psnr(true: Scores, random: Scores, horizons: Sequence[int]) -> dict:
    """ΔPSNR of each clip, in dB, as in `rollout_quality.summary`; also over motion only."""
    difference = lambda name: (
        rollout_quality.capped(getattr(true, name)) - rollout_quality.capped(getattr(random, name))
    )
    names = {"delta_psnr": "psnr", "delta_psnr_motion": "psnr_motion"}
    return {
        new: rollout_quality.by_horizon(difference(old), horizons) for new, old in names.items()
    }
