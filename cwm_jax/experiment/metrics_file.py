"""`metrics.jsonl`: a run's metrics, one JSON object per line, `{"step": 100, "train/loss": 0.12}`.

Steps never decrease, and no step has the same name twice; values reported at different times of
one step (training, then validation) have lines of their own. NaN and infinity, which JSON lacks,
are written as null. Pictures and videos are given by path.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cwm_jax.errors import UserError, echo
from cwm_jax.files import written_whole


class MetricsFile:
    """Appends to a metrics file, unbuffered.

    While the disk is full, lines are kept in memory; they are written in order as soon as possible.
    Names that the file already has at `resume_step` are not written again for it.

    Args:
        path: the file; created if missing.
        resume_step: the step of the checkpoint. Lines of later steps are removed, since the run
            repeats these steps, and also a truncated last line, in one atomic write. None: a new
            run, and all earlier lines are removed.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
        self._path = path = Path(path)
        try:
            before = path.read_bytes() if path.exists() else b""
            after = b"".join(_lines_up_to(-1 if resume_step is None else resume_step, before, path))
            if before != after:
                with written_whole(path) as temporary:
                    temporary.write_bytes(after)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot keep metrics in {path}: {error.strerror or error}") from error
        self._waiting, self._warned = b"", False
        self._resumed = {
            (record["step"], name)
            for _, record in _records(after, path)
            for name in record
            if record["step"] == resume_step
        }

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, {n: v if math.isfinite(v) else None for n, v in values.items()})

    def media(self, step: int, name: str, path: Path, kind: str) -> None:
        self._write(step, {name: os.fspath(path)})

    def close(self, *, failed: bool = False) -> None:
        self._file.close()

    def _write(self, step: int, values: dict) -> None:
        fresh = {n: v for n, v in values.items() if (step, n) not in self._resumed}
        if fresh:
            line = json.dumps({"step": step, **fresh}, allow_nan=False) + "\n"
            self._waiting += line.encode()
        try:
            while self._waiting:  # a write may be partial
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                echo(
                    f"WARNING: cannot write {self._path} ({error.strerror}); its lines are "
                    f"kept in memory until it can be written again",
                )
            self._warned = True


def read_series(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The numbers of a metrics file by name: float64 steps [n] and values [n] (NaN for null).

    A truncated last line is skipped, so a file can be read while a run writes it.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read metrics from {path}: {error.strerror}") from error
    points: dict[str, list[tuple[float, float]]] = {}
    for _, record in _records(text, path):
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                value = math.nan if value is None else value
                points.setdefault(name, []).append((record["step"], value))
    return {name: tuple(np.array(xy, float).T) for name, xy in points.items()}


def _lines_up_to(step: int, text: bytes, path: Path) -> Iterator[bytes]:
    return (line + b"\n" for line, record in _records(text, path) if record["step"] <= step)


def _records(text: bytes, path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each valid line with its record; logs every other line."""
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            if line.strip() and number < len(lines):  # the last has no newline: it is truncated
                echo(f"warning: {path}, line {number} is not a record and is ignored")
            continue
        yield line, record
