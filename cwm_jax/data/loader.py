"""Batches of clips: shuffled over the whole dataset, shared among processes, and resumable.

An epoch is one permutation of all clip numbers of the split, determined by the seed and the epoch's
number. Global batch k is a run of `batch_size` clips of it, and process p of n takes the p-th of n
equal runs of those, so the global batch is the same for every number of processes and workers.
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

from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data import bad_records, shared_memory, splits
from cwm_jax.data.clips import Batch, Clips
from cwm_jax.data.config import DataConfig
from cwm_jax.data.shards import find_shards
from cwm_jax.errors import UserError, echo
from cwm_jax.runtime import process_memory

_WORKER_STARTS = 5  # restarts of reading processes between two good batches


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
        """The batch; where bad records are skipped, with their numbers (`bad_records.BAD`)."""
        if not self._skip:
            return self.clips.batch(numbers[self.mine])
        batch, bad = self.clips.batch_of_good(numbers[self.mine])
        return {**batch, bad_records.BAD: np.array(bad, np.int64)}


_ON_OTHER_DEVICES = (
    " batch_size counts clips over all devices: on another number of devices, set "
    "config.data.global_batch_size to the old batch_size."
)


class TrainBatches(Iterator[Batch]):
    """An iterator over training batches whose position is one number.

    `get_state` returns how many batches were taken, independent of how many are being prepared;
    `set_state` continues at that place, also with other numbers of processes, workers and threads.
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
        self._tally = bad_records.Tally(loader.clips.episodes, config.max_bad_records)
        self._tally.add(loader.clips.episodes.bad)
        self._taken = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        batch = self._tally.take(self._next())
        self._taken += 1
        return batch

    def _next(self) -> Batch:
        """The next batch; killed reading processes are restarted."""
        for attempt in range(_WORKER_STARTS):
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
                    f"warning: a reading process has exited ({error}); restarting all of them "
                    f"at batch {self._taken} ({attempt + 1} of {_WORKER_STARTS} tries)",
                )
        raise UserError(
            f"reading processes exited {_WORKER_STARTS} times at batch {self._taken}. If they "
            f"need more memory than there is, lower data.num_workers={self._config.num_workers}."
        )

    def origins(self, batch: int) -> list[dict[str, str | int]]:
        """Where each clip of global batch number `batch` (from 0) is in the files."""
        return self._origins(self._numbers[batch])

    def _origins(self, clips: Iterable[int]) -> list[dict[str, str | int]]:
        places = map(self._clips.origin, clips)
        return [
            {"shard": str(path), "record": record, "first_frame": frame}
            for path, record, frame in places
        ]

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; the clips left at its end, too few for a batch, are skipped."""
        return self._identity["clips"] // self._identity["batch_size"]

    @property
    def bad_records(self) -> int:
        """Number of records skipped so far, each counted once."""
        return len(self._tally.episodes)

    def get_state(self) -> dict[str, Any]:
        """The position and what it depends on, as JSON values."""
        bad = sorted(self._tally.episodes)
        return {"batches_taken": self._taken, bad_records.BAD: bad, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position from `get_state`.

        Raises `UserError` if it is of other data, another batch size or another seed, for which
        the same number means other clips.
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
        self._tally.episodes = {*state[bad_records.BAD], *self._clips.episodes.bad}

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
    """Shuffled batches of the split `train`, for `epochs` epochs or, by default, endlessly.

    Each batch holds this process's `batch_size / process_count` clips: `frames` uint8
    [B, clip_len, 64, 64, 3] and `actions` int32 [B, clip_len], where `actions[:, i]` led to frame
    i and slot 0 is `NO_ACTION`. An epoch contains every clip once, except those at its end
    that fill no batch (fewer than `batch_size`, others in each epoch). `seed` is 0…2³²-1.
    `make` is `TrainBatches` or a subclass of it.

    Raises `UserError` for a mistake in `config`, missing or damaged files, or a batch that is
    larger than the dataset; `BadRecord` at the batch that holds a bad record, unless
    `config.on_bad_record` is "skip".
    """
    clips = splits.open_clips(config, "train", num_actions=num_actions, outcomes=outcomes)
    if batch_size > len(clips):
        raise UserError(
            f"batch_size is {batch_size}, but {config.dir}/train has only {len(clips)} clips of "
            f"{config.clip_len} frames; set a smaller batch_size or data.stride"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be 0…{2**32 - 1}")
    loader = _Loader(clips, batch_size, process_index, process_count, bad_records.skips(config))
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


def _fingerprint(shards: Sequence[Path]) -> str:
    """A digest of a dataset by the names and sizes of its files, independent of the folder."""
    listed = "".join(f"{shard.name} {shard.stat().st_size}\n" for shard in shards)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


class EvalBatches:
    """A fixed series of batches, which can be iterated repeatedly; see `eval_batches`."""

    def __init__(self, numbers: np.ndarray, batch_size: int, loader: _Loader, config: DataConfig):
        self.num_clips = len(numbers)  # in all batches of all processes, without the padding
        self._batch_size, self._loader, self._config = batch_size, loader, config
        self._tally = bad_records.Tally(loader.clips.episodes, config.max_bad_records)
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

    The last batch is padded with the last clip, so that all have one shape; `mask`
    (bool [B]) is False for these. Otherwise batches and errors are as in `train_batches`.
    """
    clips = splits.open_clips(config, split, num_actions=num_actions)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 clip")
    count = min(limit or len(clips), len(clips))
    loader = _Loader(clips, batch_size, process_index, process_count, bad_records.skips(config))
    return EvalBatches(np.arange(count) * len(clips) // count, batch_size, loader, config)


def _in_threads(batches: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    options = grain.ReadOptions(config.num_threads, prefetch_buffer_size=config.num_threads)
    return batches.to_iter_dataset(options)


def _in_background(batches: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    if config.num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, also outside of absl.app.run
    options = grain.MultiprocessingOptions(num_workers=config.num_workers)
    return _in_threads(batches, config).mp_prefetch(options, worker_init_fn=_as_worker)


def _as_worker(index: int, count: int) -> None:
    """Makes a reading process ignore signals of the terminal, and end with its parent.

    It also keeps freed memory for the next record.
    """
    process_memory.keep_freed()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
