"""The real clips that rollouts start from and are compared with."""

import hashlib
from typing import NamedTuple

import numpy as np

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.data import splits
from cwm_jax.data.clips import Episodes
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError


class HeldOut(NamedTuple):
    """The first T frames of B records of a split."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    actions: np.ndarray  # int32 [B, T], the action that led into each frame
    records: int  # in the split
    too_short: int  # of these, with fewer than T frames
    digest: str  # of the clips' frames and actions, independent of file names

    def __len__(self) -> int:
        return len(self.frames)


def load(
    config: DataConfig,
    split: str,
    *,
    frames: int,
    up_to: int = 0,
    clips: int = 0,
    num_actions: int = NUM_ACTIONS,
) -> HeldOut:
    """The first frames of `clips` records that have `frames` (0: of all that have).

    Args:
        up_to: take more than `frames`, up to so many, where each chosen record has them.

    Raises:
        UserError: no record is that long, or fewer than requested are.
    """
    episodes = splits.open_episodes(config, split, num_actions=num_actions)
    eligible = len(long_enough(episodes, config, split, frames=frames))
    if clips > eligible:
        raise UserError(
            f"{clips} clips were requested; {eligible} of {len(episodes)} records of "
            f"{config.dir}/{split} have the {frames} frames that this needs"
        )
    chosen = sorted(splits.pick_episodes(episodes, count=clips or eligible, length=frames))
    length = max(frames, min(up_to, int(episodes.lengths[chosen].min())))
    batch = splits.load_clips(episodes, chosen, length=length)
    return HeldOut(
        **batch,
        records=len(episodes),
        too_short=len(episodes) - eligible,
        digest=digest(**batch),
    )


def long_enough(episodes: Episodes, config: DataConfig, split: str, *, frames: int) -> np.ndarray:
    """The numbers of the records of `frames` or more. Raises `UserError` if there are none."""
    (found,) = np.nonzero(episodes.lengths >= frames)
    if not len(found):
        longest = int(episodes.lengths.max())
        raise UserError(
            f"no record of {config.dir}/{split} has {frames} frames (the longest has {longest}): "
            f"generate at least {frames - longest} frames fewer"
        )
    return found


def digest(frames: np.ndarray, actions: np.ndarray) -> str:
    """SHA-256 of clips by their content, the first 16 hexadecimal digits."""
    content = hashlib.sha256(repr(frames.shape).encode())
    for array in (frames, actions):
        content.update(np.ascontiguousarray(array))
    return content.hexdigest()[:16]
