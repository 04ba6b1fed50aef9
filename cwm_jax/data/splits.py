"""The episodes and clips of a split: opening them, choosing some, loading them."""

from collections.abc import Sequence

import numpy as np

from cwm_jax import controls
from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.data import bad_records
from cwm_jax.data.clips import Batch, Clips, Episodes, cut
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import OUTCOME_KEYS, BadRecord
from cwm_jax.data.shards import find_shards
from cwm_jax.errors import UserError

_TRIED = 8  # records that are checked for rewards


def open_episodes(
    config: DataConfig, split: str, *, num_actions: int = NUM_ACTIONS, outcomes: bool = False
) -> Episodes:
    """The episodes of `split`, by number; with `outcomes`, with rewards and ends.

    Raises `UserError` if there are none, or their game has other actions than `num_actions`, or
    outcomes are requested and the first records have none; and `BadRecord` if more of those
    decoded for their lengths are bad than `config` allows.
    """
    known = controls.read(config.dir)
    # Data of CoinRun may be used with more actions than it has, those of another game may not:
    # they would be taken for CoinRun's.
    fits = known.num_values <= num_actions if known.is_procgen else known.num_values == num_actions
    if not fits:
        what = f"{len(known.controls)} {'buttons' if known.encoding == 'buttons' else 'actions'}"
        raise UserError(
            f"{config.dir} is of {known.game}, which has {what}, and the model has "
            f"{num_actions} actions. To train on it, set "
            f"--config.model.num_actions={len(known.controls)} "
            f"--config.model.action_encoding={known.encoding}; to use a model, give the data of "
            "its game"
        )
    allowed = config.max_bad_records if bad_records.skips(config) else 0
    settings = dict(num_actions=num_actions, max_bad=allowed, outcomes=outcomes)
    episodes = Episodes(find_shards(config.dir, split), **settings)
    if outcomes and not any(_has_outcomes(episodes, n) for n in range(len(episodes))[:_TRIED]):
        raise UserError(
            f"{config.dir}/{split}: its records have no rewards and ends of episodes "
            f"({' and '.join(OUTCOME_KEYS)}), which config.model.heads=True needs; record some "
            "with `python -m cwm_jax.tools.collect`, or set config.model.heads=False"
        )
    return episodes


def _has_outcomes(episodes: Episodes, number: int) -> bool:
    try:
        return episodes[number].outcomes is not None
    except BadRecord:  # raised or skipped later, when its clips are read
        return False


def open_clips(
    config: DataConfig, split: str, *, num_actions: int = NUM_ACTIONS, outcomes: bool = False
) -> Clips:
    """The clips of `split`, by number. Raises `UserError` if no episode is long enough."""
    episodes = open_episodes(config, split, num_actions=num_actions, outcomes=outcomes)
    return Clips(episodes, clip_len=config.clip_len, stride=config.stride)


def pick_episodes(episodes: Episodes, *, count: int, length: int, seed: int = 0) -> list[int]:
    """Numbers of `count` different episodes of at least `length` frames, the same for one seed."""
    (eligible,) = np.nonzero(episodes.lengths >= length)
    if not 1 <= count <= len(eligible):
        raise UserError(
            f"{count} episodes of at least {length} frames were requested; {len(eligible)} of "
            f"{len(episodes)} are that long (the longest has {episodes.lengths.max()})"
        )
    return np.random.default_rng(seed).permutation(eligible)[:count].tolist()


def good_episodes(
    config: DataConfig, episodes: Episodes, numbers: Sequence[int], *, length: int
) -> list[int]:
    """`numbers`; if `config` skips bad records, with the next good one in place of each bad one.

    The replacement has at least `length` frames and is not among `numbers`. If there is none, the
    bad one is left out; if all are bad, none is. Bad records are logged and counted as in
    batches, and too many raise `UserError`.
    """
    if not bad_records.skips(config):
        return list(numbers)
    tally = bad_records.Tally(episodes, config.max_bad_records)
    (eligible,) = np.nonzero(episodes.lengths >= length)
    spare, good = np.setdiff1d(eligible, numbers), []
    for number in numbers:
        following = np.roll(spare, -np.searchsorted(spare, number)).tolist()
        found = next((n for n in (number, *following) if tally.is_good(n)), None)
        if found is not None:
            good.append(found)
            spare = spare[spare != found]
    return good or list(numbers)


def load_clips(episodes: Episodes, numbers: Sequence[int], *, length: int) -> Batch:
    """The first `length` frames of the episodes with these numbers, as a batch.

    Raises `UserError` for a number that does not exist or an episode that is too short.
    """
    for number in numbers:
        if not 0 <= number < len(episodes):
            raise UserError(f"there is no episode {number}; valid are 0…{len(episodes) - 1}")
        if not 1 <= length <= episodes.lengths[number]:
            raise UserError(
                f"{length} frames of episode {number} were requested; it has "
                f"{episodes.lengths[number]}"
            )
    return cut(episodes, [(number, 0) for number in numbers], length)
