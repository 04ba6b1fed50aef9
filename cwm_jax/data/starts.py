"""Frames of recorded episodes to start worlds from; the seed determines them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cwm_jax.coinrun import NO_ACTION, NUM_ACTIONS
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError


class Start(NamedTuple):
    """Consecutive real frames of one episode, and the actions between them."""

    frames_PHWC: np.ndarray  # uint8
    actions_P: np.ndarray  # int32, the action that led into each; the first is NO_ACTION


class Starts:
    """Places to start from in the episodes of one split of a data folder.

    Args:
        folder: a data folder with `val/` or the split that is named.
        split: the split of the episodes.
        num_actions: number of action values of the network; the data may have no others.

    Raises:
        UserError: there is no such data.
    """

    def __init__(self, folder: Path | str, split: str = "val", *, num_actions: int = NUM_ACTIONS):
        self._folder, self._split = folder, split
        config = DataConfig(dir=str(folder))
        self._episodes = splits.open_episodes(config, split, num_actions=num_actions)

    def at(self, seed: int, frames: int) -> Start:
        """The `frames` frames at which `seed` starts: uniform over the episodes that are long
        enough, then over the places in the episode.

        Raises:
            UserError: no episode is that long.
        """
        (numbers,) = np.nonzero(self._episodes.lengths >= frames)
        if not numbers.size:
            raise UserError(
                f"{frames} frames to start from: the longest episode of "
                f"{self._folder}/{self._split} has {self._episodes.lengths.max()}"
            )
        rng = np.random.default_rng(seed)
        episode = self._episodes[int(rng.choice(numbers))]
        first = int(rng.integers(len(episode) - frames + 1))
        actions_P = np.full(frames, NO_ACTION, np.int32)
        actions_P[1:] = episode.actions[first : first + frames - 1]
        return Start(episode.frames[first : first + frames], actions_P)
