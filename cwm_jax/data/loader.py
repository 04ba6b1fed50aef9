"""Batches of clips: shuffled over the whole dataset, shared among processes, and resumable.

An epoch is one permutation of all clip numbers of the split, drawn from the seed and the epoch's
number. Global batch k is a run of `batch_size` clips of it, and process p of n takes the p-th of
n equal runs of those, so the global batch is the same for every number of processes and workers.
"""

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from cwm_jax import controls
from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data import shared_memory
from cwm_jax.data.clips import Batch, Clips, Episodes, cut
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import OUTCOME_KEYS, BadRecord
from cwm_jax.data.shards import find_shards
from cwm_jax.errors import UserError, echo
from cwm_jax.runtime import process_memory

_TRIED = 8  # records that are looked at for rewards
_WORKER_LIVES = 5  # how often reading processes that died are replaced between two good batches
BAD = "bad_episodes"  # beside a batch on its way to the caller: numbers of episodes passed over


class _Loader:
    """Turns the clip numbers of a global batch into this process's share of the batch."""

    def __init__(
        self, clips: Clips, batch_size: int, process_index: int, process_count: int, skip: bool
    ):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size is {batch_size}; it must be positive and divide evenly among "
                f"{process_count} processes"
            )
        share = batch_size // process_count
        self.clips, self._skip = clips, skip
        self.mine = slice(process_index * share, (process_index + 1) * share)

    def __call__(self, numbers: Sequence[int]) -> Batch:
        """The batch; where bad records are skipped, with their numbers for a `_Tally`."""
        if not self._skip:
            return self.clips.batch(numbers[self.mine])
        batch, bad = self.clips.batch_of_good(numbers[self.mine])
        return {**batch, BAD: np.array(bad, np.int64)}


class _Tally:
    """Counts the bad records of a split that were passed over, and says when they are too many."""

    def __init__(self, records: Episodes, limit: int):
        self.episodes: set[int] = set()
        self._records, self._limit = records, limit

    def take(self, batch: Batch) -> Batch:
        """The batch alone. Raises `UserError` once more than `limit` records were bad."""
        self.add(batch.pop(BAD, np.array([], np.int64)).tolist())
        return batch

    def is_good(self, number: int) -> bool:
        """Reads a record; raises as `take`."""
        try:
            self._records[number]
        except BadRecord:
            self.add([number])
            return False
        return True

    def add(self, numbers: Iterable[int]) -> None:
        """Counts and tells bad records; raises as `take`."""
        for number in numbers:
            if number not in self.episodes:
                self.episodes.add(number)
                self._tell(number)

    def _tell(self, number: int) -> None:
        try:
            self._records[number]
            reason = "it could not be read a moment ago"
        except BadRecord as bad:
            reason = bad.reason
        path, index = self._records.path(number)
        count = len(self.episodes)
        told = f"{path}, record {index}: {reason}"
        if count > self._limit:
            raise UserError(
                f"{told}\nThat is bad record number {count} of this split, and "
                f"data.max_bad_records={self._limit}: mend the data, or allow more."
            )
        echo(
            f"warning: {told}; skipped ({count} of at most {self._limit})",
        )


_ON_OTHER_DEVICES = (
    " batch_size counts clips over all devices: on another number of devices, set "
    "config.data.global_batch_size to the old batch_size."
)


class TrainBatches(Iterator[Batch]):
    """An iterator over training batches whose position is one number.

    `get_state` tells how many batches were taken, however many are being prepared, and
    `set_state` goes to that place, also with other numbers of processes, workers and threads.
    """

    def __init__(
        self,
        numbers: grain.MapDataset,
        loader: _Loader,
        config: DataConfig,
        identity: dict[str, int | str],
    ):
        self._numbers, self._batches = numbers, numbers.map(loader)
        self._clips, self._config, self._identity = loader.clips, config, identity
        self._tally = _Tally(loader.clips.episodes, config.max_bad_records)
        self._tally.add(loader.clips.episodes.bad)
        self._taken = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        batch = self._tally.take(self._next())
        self._taken += 1
        return batch

    def _next(self) -> Batch:
        """The next batch, also if processes that prepare batches are killed."""
        for life in range(_WORKER_LIVES):
            try:
                if self._iterator is None:
                    remaining = self._batches.slice(slice(self._taken, None))
                    self._iterator = iter(_in_background(remaining, self._config))
                return next(self._iterator)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                self.close()
                echo(
                    f"warning: a process that reads data has died ({error}); starting all of them "
                    f"again at batch {self._taken} ({life + 1} of {_WORKER_LIVES} tries)",
                )
        raise UserError(
            f"processes that read data died {_WORKER_LIVES} times at batch {self._taken}. If they "
            f"want more memory than there is, lower data.num_workers={self._config.num_workers}."
        )

    def origins(self, batch: int) -> list[dict[str, str | int]]:
        """Where each clip of global batch number `batch` (from 0) lies in the files."""
        return self._origins(self._numbers[batch])

    def _origins(self, clips: Iterable[int]) -> list[dict[str, str | int]]:
        places = map(self._clips.origin, clips)
        return [
            {"shard": str(path), "record": record, "first_frame": frame}
            for path, record, frame in places
        ]

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; the clips left at its end, too few for a batch, are passed over."""
        return self._identity["clips"] // self._identity["batch_size"]

    @property
    def bad_records(self) -> int:
        """Records passed over so far, each counted once."""
        return len(self._tally.episodes)

    def get_state(self) -> dict[str, Any]:
        """The position and what it depends on, as plain values that JSON can hold."""
        bad = sorted(self._tally.episodes)
        return {"batches_taken": self._taken, BAD: bad, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from `get_state`.

        Raises `UserError` if it belongs to other data, another batch size or another seed, where
        the same number would mean other clips.
        """
        differing = [
            f"{field}={state.get(field)}, this run has {field}={now}"
            for field, now in self._identity.items()
            if state.get(field) != now
        ]
        if differing:
            raise UserError(
                f"The saved data position has {'; '.join(differing)}: they order clips "
                f"differently. Resume with the same, or start a new run in another workdir."
                + (_ON_OTHER_DEVICES if any("batch_size" in text for text in differing) else "")
            )
        self.close()
        self._taken = state["batches_taken"]
        self._tally.episodes = {*state[BAD], *self._clips.episodes.bad}

    def close(self) -> None:
        """Stops threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def train_batches(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_actions: int = NUM_ACTIONS,
    outcomes: bool = False,
    epochs: int | None = None,
    make: Callable[..., TrainBatches] = TrainBatches,
) -> TrainBatches:
    """Shuffled batches of the split `train`, for `epochs` epochs or, by default, for ever.

    Each batch holds this process's `batch_size / process_count` clips: `frames` uint8
    [B, clip_len, 64, 64, 3] and `actions` int32 [B, clip_len], where `actions[:, i]` led to frame
    i and slot 0 is `NO_ACTION`. An epoch visits every clip once, but for the clips at its end
    that fill no batch (fewer than `batch_size`, others in each epoch). `seed` is 0…2³²-1.
    `make` is `TrainBatches` or a subclass of it.

    Raises `UserError` for a mistake in `config`, missing or damaged files, or a batch that is
    larger than the dataset; `BadRecord` at the batch that holds a bad record, unless
    `config.on_bad_record` is "skip".
    """
    clips = open_clips(config, "train", num_actions=num_actions, outcomes=outcomes)
    if batch_size > len(clips):
        raise UserError(
            f"batch_size is {batch_size}, but {config.dir}/train has only {len(clips)} clips of "
            f"{config.clip_len} frames; set a smaller batch_size or data.stride"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be 0…{2**32 - 1}")
    loader = _Loader(clips, batch_size, process_index, process_count, skips(config))
    if config.num_workers:
        share = batch_size // process_count * config.clip_len * math.prod(FRAME_SHAPE)
        shared_memory.warn_if_short(config.num_workers, share)
    order = grain.MapDataset.range(len(clips)).shuffle(seed)
    numbers = order.batch(batch_size, drop_remainder=True, batch_fn=list).repeat(epochs)
    identity = {
        "seed": seed,
        "batch_size": batch_size,
        "clip_len": config.clip_len,
        "stride": config.stride,
        "clips": len(clips),
        "shards": _fingerprint(find_shards(config.dir, "train")),
    }
    return make(numbers, loader, config, identity)


def skips(config: DataConfig) -> bool:
    return config.on_bad_record == "skip"


def _fingerprint(shards: Sequence[Path]) -> str:
    """Tells one dataset from another by the names and sizes of its files, wherever they lie."""
    listed = "".join(f"{shard.name} {shard.stat().st_size}\n" for shard in shards)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


class EvalBatches:
    """A fixed series of batches, to be gone through as often as wanted; see `eval_batches`."""

    def __init__(self, numbers: np.ndarray, batch_size: int, loader: _Loader, config: DataConfig):
        self.num_clips = len(numbers)  # in all batches of all processes, without the padding
        self._batch_size, self._loader, self._config = batch_size, loader, config
        self._tally = _Tally(loader.clips.episodes, config.max_bad_records)
        self._tally.add(loader.clips.episodes.bad)
        padding = -len(numbers) % batch_size
        self._numbers = np.pad(numbers, (0, padding), mode="edge")

    def __len__(self) -> int:
        return len(self._numbers) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        places = range(len(self._numbers))[index * self._batch_size :][: self._batch_size]
        if not places:
            raise IndexError(index)
        mask = np.array([place < self.num_clips for place in places])
        return {**self._loader(self._numbers[places]), "mask": mask[self._loader.mine]}

    def __iter__(self) -> Iterator[Batch]:
        # Neighbouring clips share a decoded episode: threads keep up, processes start slowly.
        iterator = iter(_in_threads(grain.MapDataset.source(self), self._config))
        try:
            yield from map(self._tally.take, iterator)
        finally:
            iterator.close()


def eval_batches(
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_actions: int = NUM_ACTIONS,
) -> EvalBatches:
    """Every clip of `split` once, in order; or `limit` clips at even distances over the split.

    The last batch is filled up by repeating the last clip, so that all have one shape; `mask`
    (bool [B]) is False for these. Otherwise batches and errors are as in `train_batches`.
    """
    clips = open_clips(config, split, num_actions=num_actions)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 clip")
    count = min(limit or len(clips), len(clips))
    loader = _Loader(clips, batch_size, process_index, process_count, skips(config))
    return EvalBatches(np.arange(count) * len(clips) // count, batch_size, loader, config)


def open_episodes(
    config: DataConfig, split: str, *, num_actions: int = NUM_ACTIONS, outcomes: bool = False
) -> Episodes:
    """The episodes of `split`, by number; with `outcomes`, with rewards and ends.

    Raises `UserError` if there are none to be found, or their game has more actions than
    `num_actions`, or outcomes are asked for and the first records have none; and `BadRecord` if
    more of those that tell the lengths are bad than `config` allows.
    """
    known = controls.read(config.dir)
    if known.num_values > num_actions:
        what = f"{len(known.controls)} {'buttons' if known.encoding == 'buttons' else 'actions'}"
        raise UserError(
            f"{config.dir} is of {known.game}, which has {what}, and the model knows "
            f"{num_actions} actions. To train on it, set "
            f"--config.model.num_actions={len(known.controls)} "
            f"--config.model.action_encoding={known.encoding}; to use a model, name the data of "
            "its game"
        )
    allowed = config.max_bad_records if skips(config) else 0
    settings = dict(num_actions=num_actions, max_bad=allowed, outcomes=outcomes)
    episodes = Episodes(find_shards(config.dir, split), **settings)
    if outcomes and not any(_has_outcomes(episodes, n) for n in range(len(episodes))[:_TRIED]):
        raise UserError(
            f"{config.dir}/{split}: its records have no rewards and ends of episodes "
            f"({' and '.join(OUTCOME_KEYS)}), which config.model.heads=True learns; record some "
            "with `python -m cwm_jax.tools.collect`, or set config.model.heads=False"
        )
    return episodes


def _has_outcomes(episodes: Episodes, number: int) -> bool:
    try:
        return episodes[number].outcomes is not None
    except BadRecord:  # which is raised, or skipped, where its clips are read
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
            f"{count} episodes of at least {length} frames were asked for; {len(eligible)} of "
            f"{len(episodes)} are that long (the longest has {episodes.lengths.max()})"
        )
    return np.random.default_rng(seed).permutation(eligible)[:count].tolist()


def good_episodes(
    config: DataConfig, episodes: Episodes, numbers: Sequence[int], *, length: int
) -> list[int]:
    """`numbers`; if `config` skips bad records, with the next good one in place of each bad one.

    That one has at least `length` frames and is not among `numbers`. Where there is no such one,
    the bad one is left out; if all are bad, none is. Bad records are told and counted as in
    batches, and too many raise `UserError`.
    """
    if not skips(config):
        return list(numbers)
    tally = _Tally(episodes, config.max_bad_records)
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
            raise UserError(f"there is no episode {number}; they count 0…{len(episodes) - 1}")
        if not 1 <= length <= episodes.lengths[number]:
            raise UserError(
                f"{length} frames of episode {number} were asked for; it has "
                f"{episodes.lengths[number]}"
            )
    return cut(episodes, [(number, 0) for number in numbers], length)


def _in_threads(batches: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    options = grain.ReadOptions(config.num_threads, prefetch_buffer_size=config.num_threads)
    return batches.to_iter_dataset(options)


def _in_background(batches: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    if config.num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, also outside of absl.app.run
    options = grain.MultiprocessingOptions(num_workers=config.num_workers)
    return _in_threads(batches, config).mp_prefetch(options, worker_init_fn=_as_worker)


def _as_worker(index: int, count: int) -> None:
    """Makes a reading process leave signals of the terminal to its parent, and end with it.

    And keep its memory, record after record.
    """
    process_memory.keep_freed()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
