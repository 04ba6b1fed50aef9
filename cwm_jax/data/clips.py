"""Numbered episodes and clips of a split, and batches of clips.

Start-up reads no video: a record's length in bytes is in its shard's chunk headers, and
records of the same length in bytes are assumed to have the same number of frames. One of each
length is decoded to find that number; all others are checked when they are read. If bad records
are skipped and the decoded one is bad, the next of its length is decoded instead.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from cwm_jax.coinrun import FRAME_SHAPE, NO_ACTION, NUM_ACTIONS
from cwm_jax.data.records import BadRecord, Episode, decode
from cwm_jax.data.shards import (
    Readers,
    check_size,
    check_sizes,
    open_shard,
    read_record,
    record_sizes,
)
from cwm_jax.errors import UserError

Batch = dict[str, np.ndarray]
OUTCOMES = ("rewards", "ends")  # in a batch, in the order of `records.Outcomes`

_INDEX_THREADS = 16  # they mostly wait for the disk
_NEIGHBOURS = 100  # bad records in a row: a whole shard, not one record
_SILENT_SECONDS = 2.0  # an index that takes longer shows its progress


class Episodes:
    """The episodes of some shards, numbered from 0 in order of shard and record.

    `lengths` (int32 [R]) is the number of frames of each: 0 for those in `bad`, the faults of
    records whose length no other record determines.

    Args:
        max_bad: so many bad records are skipped here; one more is raised as `BadRecord`.
        outcomes: rewards and ends of episodes are read too, and put into clips.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        num_actions: int = NUM_ACTIONS,
        max_bad: int = 0,
        outcomes: bool = False,
    ):
        index = _Index(num_actions, max_bad)
        per_shard = index.lengths(shards)
        self.lengths = np.concatenate(per_shard)
        if not len(self.lengths):
            raise UserError(f"{shards[0].parent} contains no records: its shards are all empty.")
        self._shard_ends = np.cumsum([len(lengths) for lengths in per_shard])
        self._readers = Readers(shards)
        self._num_actions, self.outcomes = num_actions, outcomes
        (unknown,) = np.nonzero(self.lengths == 0)
        self.bad = {int(number): index.bad[self.path(number)] for number in unknown}
        if len(self.bad) == len(self):
            raise self.bad[0]

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, number of the record in it) of an episode."""
        shard = int(np.searchsorted(self._shard_ends, number, side="right"))
        before = int(self._shard_ends[shard - 1]) if shard else 0
        return shard, int(number) - before

    def path(self, number: int) -> tuple[Path, int]:
        """(file of the shard, number of the record in it) of an episode."""
        shard, index = self.place(number)
        return self._readers.shards[shard], index

    def __getitem__(self, number: int) -> Episode:
        """Raises `BadRecord` with its place if the record is no episode, or its file is missing."""
        if number in self.bad:
            raise self.bad[number]
        shard, index = self.place(number)
        path, expected = self._readers.shards[shard], self.lengths[number]
        try:
            record = self._readers.read(shard, index)
        except BadRecord:
            raise
        except UserError as error:  # the file was there when the run began
            raise BadRecord(str(error), path, index) from None
        episode = _decoded(record, path, index, self._num_actions, self.outcomes)
        if len(episode) != expected:
            raise BadRecord(
                f"it has {len(episode)} frames; other records of {len(record)} bytes have "
                f"{expected}, and the index of clips relies on that",
                path,
                index,
            )
        return episode


class Clips:
    """All clips of `clip_len` frames that start every `stride` frames of each episode.

    With outcomes the last clip of each episode ends with its last frame instead, since only that
    frame has the episode's end.
    """

    def __init__(self, episodes: Episodes, *, clip_len: int, stride: int):
        self.clip_len, self.stride = clip_len, stride
        self.episodes = episodes
        self._ends = np.cumsum(clip_counts(episodes.lengths, clip_len, stride))
        if not len(self):
            longest = episodes.lengths.max()
            raise UserError(
                f"clip_len is {clip_len} frames, but the longest of {len(episodes)} episodes has "
                f"{longest}; set data.clip_len to at most {longest}."
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, clip: int) -> tuple[int, int]:
        """(number of the episode, the first frame of the clip)."""
        episode = int(np.searchsorted(self._ends, clip, side="right"))
        before = int(self._ends[episode - 1]) if episode else 0
        if self.episodes.outcomes and clip == self._ends[episode] - 1:
            return episode, int(self.episodes.lengths[episode]) - self.clip_len
        return episode, (int(clip) - before) * self.stride

    def of_episode(self, number: int) -> range:
        """The clips of an episode, in order of their first frames."""
        return range(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))

    def origin(self, clip: int) -> tuple[Path, int, int]:
        """(file of the shard, number of the record in it, first frame in that) of a clip."""
        episode, start = self.locate(clip)
        return *self.episodes.path(episode), start

    def batch(self, clips: Sequence[int]) -> Batch:
        """The clips with these numbers, as `cut` returns them."""
        return cut(self.episodes, [self.locate(clip) for clip in clips], self.clip_len)

    def batch_of_good(self, clips: Sequence[int]) -> tuple[Batch, list[int]]:
        """As `batch`, but a clip from a bad record is replaced by one from the next good record.

        The replacement depends only on the clip, so it is the same in every process.

        Returns:
            The batch, and the numbers of the bad episodes.

        Raises:
            BadRecord: none of the next `_NEIGHBOURS` episodes with clips is good.
        """
        try:
            return self.batch(clips), []
        except BadRecord:  # seldom, so each clip may be read twice
            found = [self._good(clip) for clip in clips]
        places, bad = [place for place, _ in found], {e for _, episodes in found for e in episodes}
        return cut(self.episodes, places, self.clip_len), sorted(bad)

    def _good(self, clip: int) -> tuple[tuple[int, int], list[int]]:
        """Where to cut a clip, or its replacement; and the bad episodes before it."""
        place, bad = self.locate(clip), []
        while True:
            try:
                self.episodes[place[0]]
            except BadRecord:
                bad.append(place[0])
                if len(bad) > _NEIGHBOURS:
                    raise
                place = self.locate(int(self._ends[place[0]]) % len(self))
            else:
                return place, bad


def clip_counts(lengths: np.ndarray, clip_len: int, stride: int) -> np.ndarray:
    """The number of clips in episodes of `lengths` frames: (T − clip_len) // stride + 1, or 0."""
    return np.maximum(0, (lengths.astype(np.int64) - clip_len) // stride + 1)


def cut(episodes: Episodes, places: Sequence[tuple[int, int]], length: int) -> Batch:
    """Clips of `length` frames from `places`, pairs of (number of the episode, first frame).

    Returns `frames` uint8 [B, length, 64, 64, 3] and `actions` int32 [B, length], where
    `actions[:, i]` led to frame i and slot 0 is `NO_ACTION`. Each episode is decoded once for
    all its clips that are adjacent in `places`. With outcomes the batch has three more
    arrays [B, length]: `pressed` (int32), the action pressed at each frame, and its results,
    `rewards` and `ends` (float32; NaN if the record has none).
    """
    frames = np.empty((len(places), length, *FRAME_SHAPE), np.uint8)
    actions = np.full((len(places), length), NO_ACTION, np.int32)
    batch = {"frames": frames, "actions": actions}
    if episodes.outcomes:
        batch["pressed"] = np.empty_like(actions)
        batch |= {key: np.full(actions.shape, np.nan, np.float32) for key in OUTCOMES}
    current = None
    for row, (number, start) in enumerate(places):
        if number != current:
            episode, current = episodes[number], number
        frames[row] = episode.frames[start : start + length]
        actions[row, 1:] = episode.actions[start : start + length - 1]
        if episodes.outcomes:
            batch["pressed"][row] = episode.actions[start : start + length]
            for key, values in zip(OUTCOMES, episode.outcomes or (), strict=False):
                batch[key][row] = values[start : start + length]
    return batch


class _Index:
    """Finds the number of frames of each record; `bad` holds, by place, the skipped records."""

    def __init__(self, num_actions: int, max_bad: int):
        self.bad: dict[tuple[Path, int], BadRecord] = {}
        self._num_actions, self._max_bad = num_actions, max_bad
        self._frames: dict[int, int] = {}  # by size; threads share it and may compute one twice

    def lengths(self, shards: Sequence[Path]) -> list[np.ndarray]:
        """The number of frames of each record of each shard, 0 where it cannot be known."""
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            found = pool.map(self._of_shard, shards)
            progress = tqdm(found, "Indexing", len(shards), unit=" shards", delay=_SILENT_SECONDS)
            pairs = list(zip(shards, progress, strict=True))
        # A later shard may have a good record of a size whose earlier records were all bad.
        return [known if known.all() else self._of_shard(shard) for shard, known in pairs]

    def _of_shard(self, shard: Path) -> np.ndarray:
        sizes = record_sizes(shard)
        reader = open_shard(shard)
        count = reader.num_records()
        if sizes is None or len(sizes) != count:  # a layout we cannot step through
            check_sizes(shard, sizes or ())
            return np.array([self._frames_of(reader, shard, i) for i in range(count)], np.int32)
        for index, size in enumerate(sizes):
            if size not in self._frames and (frames := self._frames_of(reader, shard, index, size)):
                self._frames[size] = frames
        return np.array([self._frames.get(size, 0) for size in sizes], np.int32)

    def _frames_of(self, reader: ArrayRecordReader, shard: Path, index: int, size: int = 0) -> int:
        """The number of frames of a record, 0 if it is bad."""
        try:
            check_size(shard, index, size)
            record = read_record(reader, shard, index)
            return len(_decoded(record, shard, index, self._num_actions))
        except BadRecord as bad:
            self.bad[shard, index] = bad
        if len(self.bad) <= self._max_bad:
            return 0
        more = f"; more than {self._max_bad} records are bad" if self._max_bad else ""
        raise BadRecord(self.bad[shard, index].reason + more, shard, index)


def _decoded(
    record: bytes, shard: Path, index: int, num_actions: int, outcomes: bool = False
) -> Episode:
    try:
        return decode(record, num_actions=num_actions, outcomes=outcomes)
    except BadRecord as bad:
        raise bad.at(shard, index) from None
