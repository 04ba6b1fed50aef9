"""Skipping bad records: counted and logged, up to a limit."""

from collections.abc import Iterable

import numpy as np

from cwm_jax.data.clips import Batch, Episodes
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import BadRecord
from cwm_jax.errors import UserError, echo

BAD = "bad_episodes"  # key in a batch before it is returned: numbers of skipped episodes


def skips(config: DataConfig) -> bool:
    return config.on_bad_record == "skip"


class Tally:
    """Counts the skipped bad records of a split, and raises an error above a limit."""

    def __init__(self, records: Episodes, limit: int):
        self.episodes: set[int] = set()
        self._records, self._limit = records, limit

    def take(self, batch: Batch) -> Batch:
        """The batch only. Raises `UserError` once more than `limit` records were bad."""
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
        """Counts and logs bad records; raises as `take`."""
        for number in numbers:
            if number not in self.episodes:
                self.episodes.add(number)
                self._report(number)

    def _report(self, number: int) -> None:
        try:
            self._records[number]
            reason = "it could not be read a moment ago"
        except BadRecord as bad:
            reason = bad.reason
        path, index = self._records.path(number)
        count = len(self.episodes)
        message = f"{path}, record {index}: {reason}"
        if count > self._limit:
            raise UserError(
                f"{message}\nThat is bad record number {count} of this split, and "
                f"data.max_bad_records={self._limit}: repair the data, or allow more."
            )
        echo(
            f"warning: {message}; skipped ({count} of at most {self._limit})",
        )
