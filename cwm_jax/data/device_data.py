"""Training data in the memory of one device: loaded in the background, gathered into batches.

The first episodes of the split `train`, as many as fit into `data.on_device` frames, are read once.
Batch k holds the clips of batch k of `loader.TrainBatches`, in which each clip that is not on the
device is replaced by one that is (its number modulo the number of clips there). So with the whole
split on the device, batches are those of `TrainBatches`; until it is loaded, they also depend on
the reading speed.
"""

import contextlib
import itertools
import math
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cwm_jax.coinrun import FRAME_SHAPE, NO_ACTION
from cwm_jax.data import bad_records, loader
from cwm_jax.data.clips import OUTCOMES, Batch
from cwm_jax.data.records import FRAME_BYTES, BadRecord, Episode
from cwm_jax.errors import UserError
from cwm_jax.runtime import device_speed, sharding

_CHUNK_FRAMES = 16_384  # read, copied and added in one piece: 200 MB
_READERS = 8  # threads
_KEPT = 4  # batches whose clips `origins` remembers
_CLIPS = "clips_on_device"


class _Chunk(NamedTuple):
    """Episodes to be copied to the device, padded to the rows of the largest chunk."""

    arrays: tuple[jax.Array, ...]  # what is stored of each frame, see `_kinds`
    rows: int  # without the padding
    clips: np.ndarray  # numbers of the clips in them …
    starts: np.ndarray  # … and the rows of their first frames
    bad: list[int]  # numbers of the bad episodes


class DeviceBatches(loader.TrainBatches):
    """As `loader.TrainBatches`, with batches on the device; see the module's docstring.

    Raises `UserError` for several devices, too little memory, or a limit below one episode.
    """

    def __init__(self, *args, mesh: Mesh):
        super().__init__(*args)
        if mesh.size > 1:
            raise UserError(
                f"config.data.on_device={self._config.on_device} keeps data on one device, and "
                f"there are {mesh.size}: set it to 0, or make one device visible to this process"
            )
        self._chunks = _chunks(self._clips.episodes.lengths, self._config.on_device)
        self._rows = max(sum(self._clips.episodes.lengths[c].tolist()) for c in self._chunks)
        self._place = sharding.replicated(mesh)
        self._kinds = _kinds(self._clips.episodes.outcomes)
        self._insert = jax.jit(_insert, donate_argnums=0)
        gather = lambda *arrays: _gather(*arrays, length=self._clips.clip_len)
        self._gather = jax.jit(gather, out_shardings=sharding.by_clip(mesh))
        self._numbers_of: dict[int, np.ndarray] = {}
        self._wanted = 0  # clips on the device when the state was saved
        self._forget()

    def _next(self) -> Batch:
        if self._reader is None:
            self._start()
        self._take_chunks()
        present = np.array(self._numbers[self._taken]) % len(self._present)
        self._numbers_of[self._taken] = self._present[present]
        self._numbers_of.pop(self._taken - _KEPT, None)
        batch = self._gather(*self._store, self._starts[present].astype(np.int32))
        bad, self._found_bad = self._found_bad, []
        return {**batch, bad_records.BAD: np.array(bad, np.int64)}

    def origins(self, batch: int) -> list[dict[str, str | int]]:
        if batch not in self._numbers_of:
            raise ValueError(f"batch {batch} was not among the last {_KEPT}")
        return self._origins(self._numbers_of[batch].tolist())

    def get_state(self):
        return super().get_state() | {_CLIPS: len(self._present) or self._wanted}

    def set_state(self, state) -> None:
        """As `TrainBatches`; waits until as many clips are loaded as when the state was saved."""
        super().set_state(state)
        self._wanted = state.get(_CLIPS, 0)

    def close(self) -> None:
        if self._reader is not None:
            self._stop.set()
            while self._reader.is_alive():
                with contextlib.suppress(queue.Empty):
                    self._queue.get(timeout=0.1)
        self._forget()

    def _forget(self) -> None:
        self._reader, self._store = None, None
        self._present = self._starts = np.zeros(0, np.int64)
        self._filled, self._added = 0, 0
        self._found_bad: list[int] = []

    def _start(self) -> None:
        total = sum(int(self._clips.episodes.lengths[c].sum()) for c in self._chunks)
        self._store = self._allocate(total + self._rows)  # the last chunk's padding fits too
        self._stop, self._queue = threading.Event(), queue.Queue(maxsize=2)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _allocate(self, rows: int) -> tuple[jax.Array, ...]:
        per_row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self._kinds)
        needed, there = rows * per_row, _memory()
        problem = (
            f"config.data.on_device={self._config.on_device}: {rows} frames take "
            f"{needed / 2**30:.1f} GiB of the device's memory"
        )
        if needed > there:
            raise UserError(f"{problem}, which has {there / 2**30:.1f} GiB: set it lower")
        try:
            make = lambda: tuple(jnp.zeros((rows, *shape), dtype) for shape, dtype in self._kinds)
            return jax.block_until_ready(jax.jit(make, out_shardings=self._place)())
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"{problem}, which cannot be allocated: set it lower ({error})"
            ) from None

    def _take_chunks(self) -> None:
        """Adds what has been read; waits until there is something, and as much as is required."""
        while self._added < len(self._chunks):
            enough = len(self._present) and len(self._present) >= self._wanted
            try:
                chunk = self._queue.get(block=not enough)
            except queue.Empty:
                return
            if isinstance(chunk, BaseException):
                raise chunk
            self._add(chunk)
        if not len(self._present):
            raise UserError(f"{self._config.dir}/train: all records that were read are bad")

    def _add(self, chunk: _Chunk) -> None:
        place = np.int32(self._filled)
        self._store = self._insert(self._store, chunk.arrays, place)
        self._present = np.concatenate([self._present, chunk.clips])
        self._starts = np.concatenate([self._starts, chunk.starts + self._filled])
        self._found_bad += chunk.bad
        self._filled += chunk.rows
        self._added += 1

    def _read(self) -> None:
        try:
            for chunk in self._read_chunks():
                self._queue.put(chunk)
                if self._stop.is_set():
                    return
        except BaseException as error:  # raised where batches are taken
            self._queue.put(error)

    def _read_chunks(self) -> Iterator[_Chunk]:
        with ThreadPoolExecutor(_READERS) as pool:
            for numbers in self._chunks:
                yield self._chunk(numbers, list(pool.map(self._episode, numbers)))

    def _episode(self, number: int) -> Episode | None:
        """None for a bad record that may be skipped."""
        try:
            return self._clips.episodes[number]
        except BadRecord:
            if bad_records.skips(self._config):
                return None
            raise

    def _chunk(self, numbers: range, read: list[Episode | None]) -> _Chunk:
        arrays = tuple(np.zeros((self._rows, *shape), dtype) for shape, dtype in self._kinds)
        clips, starts, bad, row = [], [], [], 0
        for number, episode in zip(numbers, read, strict=True):
            if episode is None:
                bad.append(number)
                continue
            rows = slice(row, row + len(episode))
            recorded = episode.outcomes or (np.nan,) * len(OUTCOMES)
            for array, values in zip(
                arrays, (episode.frames, episode.actions, *recorded), strict=False
            ):
                array[rows] = np.reshape(values, (-1, *array.shape[1:]))
            of_episode = self._clips.of_episode(number)
            clips.append(np.array(of_episode, np.int64))
            starts.append([row + self._clips.locate(clip)[1] for clip in of_episode])
            row = rows.stop
        on_device = jax.device_put(arrays, self._place)
        none = [np.zeros(0, np.int64)]
        return _Chunk(
            on_device, row, np.concatenate(none + clips), np.concatenate(none + starts), bad
        )


def _chunks(lengths: np.ndarray, most: int) -> list[range]:
    """Neighbouring episodes to be read together: the first ones, of `most` frames in all."""
    count = int(np.searchsorted(np.cumsum(lengths), most, side="right"))
    if not count:
        raise UserError(
            f"config.data.on_device={most} frames: the first record has {lengths[0]}; raise it"
        )
    groups = np.cumsum(lengths[:count]) // _CHUNK_FRAMES
    begins = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), count]
    return [range(a, b) for a, b in itertools.pairwise(begins)]


def _memory() -> int:
    """Memory of the device in bytes; on a CPU, this machine's memory."""
    return device_speed.memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kinds(outcomes: bool) -> list[tuple[tuple[int, ...], type]]:
    """Shape and dtype of what is stored of a frame: its pixels, the action, the outcomes."""
    return [((FRAME_BYTES,), np.uint8), ((), np.int32)] + outcomes * [((), np.float32)] * 2


def _insert(store, chunk, row):
    def insert(array, rows):
        place = (row,) + (jnp.zeros_like(row),) * (array.ndim - 1)
        return jax.lax.dynamic_update_slice(array, rows, place)

    return tuple(insert(*pair) for pair in zip(store, chunk, strict=True))


def _gather(frames, actions, *arrays, length: int) -> dict[str, jax.Array]:
    """The clips that start at the rows of the last array, as `clips.cut` returns them."""
    *outcomes, starts_B = arrays
    rows_BT = starts_B[:, None] + jnp.arange(length)
    at = lambda array, rows: array.at[rows].get(mode="promise_in_bounds")
    led = at(actions, jnp.maximum(rows_BT - 1, 0))
    batch = {
        "frames": at(frames, rows_BT).reshape(*rows_BT.shape, *FRAME_SHAPE),
        "actions": jnp.where(jnp.arange(length) == 0, NO_ACTION, led),
    }
    if outcomes:
        batch["pressed"] = at(actions, rows_BT)
        batch |= {k: at(v, rows_BT) for k, v in zip(OUTCOMES, outcomes, strict=True)}
    return batch
