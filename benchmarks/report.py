"""Rows of measurements: written to a file after each, so that a run that is stopped leaves them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from cwm_jax.runtime import device_speed

Row = dict[str, object]


class Report:
    """Rows by section, in a file that is written after each."""

    def __init__(self, path: Path, seconds: float):
        self._path, self._end = path, time.monotonic() + seconds
        self.rows: dict[str, list[Row]] = {"machine": [machine.description()]}

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    def add(self, section: str, asked: Row, measure: Callable[[], Row]) -> Row:
        """Runs a measurement, unless the time is over; an error becomes part of the row."""
        if self.left() <= 0:
            row = asked | {"failed": "no time left"}
        else:
            try:
                row = asked | measure()
            except Exception as error:  # one failure must not stop the others
                row = asked | {"failed": f"{type(error).__name__}: {error}"[:600]}
        self.rows.setdefault(section, []).append(row)
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        print(f"{section}: {machine.described(row)}", flush=True)
        return row


def timed(program, arrays, least: int) -> Row:
    """Milliseconds of a call, and the rate at which it moves its least bytes."""
    seconds = device_speed.best_time(program, *arrays, rounds=3, calls=10)
    return {"ms": 1e3 * seconds, "gb_s": least / seconds / 1e9}
