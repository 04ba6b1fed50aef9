"""How clips are drawn: by a sampler, or by anything that turns a prompt and actions into frames."""

from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from cwm_jax.coinrun import IMAGE_SIZE, NUM_ACTIONS
from cwm_jax.errors import UserError
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling.generator import Generator
from cwm_jax.sampling.sampler import Sampler


class Generate(Protocol):
    """What is measured. A model to be compared needs to be no more than such a function."""

    def __call__(self, prompt_BPHWC, actions_BT, key: jax.Array) -> jax.Array | np.ndarray:
        """The T − P frames after the prompt, uint8 [B, T − P, H, W, C].

        Args:
            prompt_BPHWC: uint8 frames that are given.
            actions_BT: int32, the action that leads into each frame, given ones included.
            key: PRNG key of all noise.
        """


def check_game(network: DiTConfig) -> None:
    """Raises a UserError for a network of another frame size, or of another game's actions."""
    if network.image_size != IMAGE_SIZE:
        raise UserError(
            f"this checkpoint draws frames of {network.image_size}×{network.image_size} pixels, "
            f"and the data has {IMAGE_SIZE}×{IMAGE_SIZE}: it cannot be measured against it"
        )
    if not network.has_coinrun_actions:
        raise UserError(
            f"this checkpoint has num_actions {network.num_actions} and action_encoding "
            f"{network.action_encoding}; only CoinRun is measured here, which has {NUM_ACTIONS} "
            f"and one_hot"
        )


def by_sampler(sampler: Generator) -> Generate:
    """Draws with a sampler or a bundle: all frames of a batch in one call of the device.

    Raises:
        UserError: (when called) where a frame is not finite; pixels would hide it.
    """

    def generate(prompt_BPHWC, actions_BT, key):
        given = prompt_BPHWC.shape[1]
        state = sampler.start(prompt_BPHWC, actions_BT[:, :given])
        state, frames = sampler.rollout(state, actions_BT[:, given:], key)
        # A frame that is NaN makes all later ones NaN, so the last ones tell.
        if not np.isfinite(jax.device_get(state.frames_BMHWC)).all():
            raise UserError(
                "the network draws frames that are not finite (NaN or infinity): its training "
                "diverged, or the checkpoint is damaged; go back to an earlier checkpoint"
            )
        return frames

    return generate


def watched_by_sampler(sampler: Sampler):
    """As `by_sampler`: (frames, how unstable the denoising of each was, float32 [B, F, h, w])."""

    def generate(prompt_BPHWC, actions_BT, key):
        given = prompt_BPHWC.shape[1]
        state = sampler.start(prompt_BPHWC, actions_BT[:, :given])
        _, frames, moved = sampler.watched_rollout(state, actions_BT[:, given:], key)
        return frames, moved

    return generate


def in_batches(
    generate: Generate, prompt_BPHWC, actions_BT, *, seed: int, batch_size: int, label: str = ""
) -> np.ndarray:
    """Generates many clips, `batch_size` at a time: uint8 [B, T − P, H, W, C].

    Where `generate` gives several arrays, so does this. Every batch has one shape, so all share one
    compiled program; the last is filled up with its last clip. Noise depends on the seed, the
    batch's number and the place in the batch alone, so two calls with other actions differ by
    nothing else.

    Args:
        label: shown on a progress bar; none without.
    """
    total = len(prompt_BPHWC)
    parts = []
    for index in tqdm(range(0, total, batch_size), desc=label, unit="batch", disable=not label):
        rows = np.minimum(np.arange(index, index + min(batch_size, total)), total - 1)
        key = jax.random.fold_in(random_numbers.key(seed), index // batch_size)
        parts.append(jax.device_get(generate(prompt_BPHWC[rows], actions_BT[rows], key)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:total], *parts)
