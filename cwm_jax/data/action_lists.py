"""Lists of actions, one for each frame, as written by hand, spreadsheets or loggers.

    NAME.csv    a column `action` (number or name), or a column of 0 and 1 for each button
    NAME.jsonl  {"action": 3}, {"action": "LEFT"} or {"buttons": ["A", "LEFT"]} a line
    NAME.npz    `actions`: integers [T], or 0 and 1 [T, buttons]

A CSV may be separated by semicolons or tabs. The case of names is ignored if names stay
unambiguous; so are spaces around them, a byte order mark, and blank lines.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax import files
from cwm_jax.controls import Controls
from cwm_jax.data import npz
from cwm_jax.errors import UserError

SUFFIXES = (".csv", ".jsonl", ".npz")
_SEPARATORS = ",;\t"
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")  # 3.0 in a column that had a gap
_BITS = {"0": 0, "1": 1, "false": 0, "true": 1}
_IDLE = "NOOP"  # as in `Controls.name` for a pad

Rows = list[tuple[int, Mapping[str, Any]]]  # the line number of each, and its values


def read(path: Path, known: Controls) -> np.ndarray:
    """The actions of a list, int32 [T]; buttons as bits.

    Raises:
        UserError: a wrong value; the message names the file, the line and the value.
    """
    if path.suffix.lower() == ".npz":
        return _from_array(path, known)
    try:
        rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"cannot read actions from {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} contains no actions")
    reader = _RowReader(known)
    return np.array([reader.action(row, f"{path}, line {line}") for line, row in rows], np.int32)


def _csv_rows(path: Path) -> Rows:
    text = files.read_text(path)
    rows = [
        (line, cells) for line, cells in _cells(text, _separator(text)) if cells not in ([], [""])
    ]
    while rows and not any(rows[-1][1]):  # rows that a spreadsheet adds below the last
        rows.pop()
    if not rows:
        return []
    (_, head), *rest = rows
    for line, cells in rest:
        if not any(cells):
            raise ValueError(f"line {line} is empty")
        if any(cells[len(head) :]):
            raise ValueError(f"line {line} has {len(cells)} values under {len(head)} columns")
    if twice := {name for name in head if name and head.count(name) > 1}:
        raise ValueError(f"two columns are named {min(twice)!r}")
    return [(line, dict(zip(head, _padded(cells, len(head)), strict=True))) for line, cells in rest]


def _separator(text: str) -> str:
    """The separator that is most frequent in the first line, or that of a `sep=;` line."""
    first = text.lstrip().partition("\n")[0].partition("\r")[0]
    declared = re.fullmatch(r'"?sep=(.)"?', first)
    return declared[1] if declared else max(_SEPARATORS, key=first.count)


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t"
    )
    line = 1
    for cells in reader:
        if not (line == 1 and cells and cells[0].startswith("sep=")):
            yield line, [cell.strip() for cell in cells]
        line = reader.line_num + 1


def _padded(cells: list[str], width: int) -> list[str]:
    return [*cells[:width], *[""] * (width - len(cells))]


def _json_rows(path: Path) -> Rows:
    lines = enumerate(files.read_text(path).split("\n"), start=1)
    rows = [(line, _json_line(text, line)) for line, text in lines if text.strip()]
    if wrong := [line for line, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"line {wrong[0]} is no JSON object")
    return rows


def _json_line(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line} is no JSON: {error.msg} at column {error.colno}") from None


class _RowReader:
    """Reads the actions of rows."""

    def __init__(self, known: Controls):
        self._known = known
        self._numbers = _by_name(control.name for control in known.controls)
        self._buttons = {control.name.casefold() for control in known.controls}

    def action(self, row: Mapping[str, Any], place: str) -> int:
        """The action of a row; raises `UserError` naming `place`."""
        column = self._column(row, "action")
        if column is not None:
            return self._named(row[column], place)
        if self._known.encoding == "one_hot":
            raise UserError(f"{place}: expected `action`, found {_listed(row)}")
        column = self._column(row, "buttons")
        if column is not None:
            return self._listed_buttons(row[column], place)
        return self._bits(row, place)

    def _column(self, row: Mapping[str, Any], name: str) -> str | None:
        """The column of this name, in any case; a button's column of that name is excluded."""
        if name in row:
            return name
        alike = [key for key in row if key.strip().casefold() == name]
        return alike[0] if len(alike) == 1 and name not in self._buttons else None

    def _named(self, value: Any, place: str) -> int:
        words = value.strip() if isinstance(value, str) else value
        number = self._numbers.get(words) if isinstance(words, str) else None
        if number is None and isinstance(words, str):
            number = self._numbers.get(words.casefold())
        if self._known.encoding == "one_hot":
            return self._in_range(_whole(words) if number is None else number, value, place)
        if number is not None:
            return 1 << number
        if isinstance(words, str) and words.upper() == _IDLE:
            return 0
        held = self._numbers_of(words.split("+")) if isinstance(words, str) else None
        return self._in_range(_whole(words) if held is None else _as_bits(held), value, place)

    def _in_range(self, number: int | None, value: Any, place: str) -> int:
        if number is not None and 0 <= number < self._known.num_values:
            return number
        names = [control.name for control in self._known.controls]
        if self._known.encoding == "one_hot":
            wanted = f"or one of {', '.join(names)}"
        else:
            wanted = f"or names joined by +, such as {'+'.join(names[:2])}"
        raise UserError(
            f"{place}: the action is {value!r}; it must be 0…{self._known.num_values - 1}, {wanted}"
        )

    def _numbers_of(self, names: Iterable[Any]) -> list[int] | None:
        """The numbers of the buttons with these names; None where one is unknown."""
        words = [str(name).strip() for name in names]
        found = [self._numbers.get(w, self._numbers.get(w.casefold())) for w in words]
        return None if None in found else found

    def _listed_buttons(self, held: Any, place: str) -> int:
        numbers = self._numbers_of(held) if isinstance(held, list) else None
        if numbers is None:
            names = ", ".join(control.name for control in self._known.controls)
            raise UserError(f"{place}: buttons are {held!r}; there are {names}")
        return _as_bits(numbers)

    def _bits(self, row: Mapping[str, Any], place: str) -> int:
        held = []
        columns = {number: key for key in row for number in self._numbers_of([key]) or ()}
        for number, control in enumerate(self._known.controls):
            column = control.name if control.name in row else columns.get(number)
            if column is None:
                raise UserError(
                    f"{place}: expected `action`, `buttons` or a column for each button; found "
                    f"{_listed(row)}, and {control.name!r} is missing"
                )
            bit = _bit(row[column])
            if bit is None:
                raise UserError(
                    f"{place}: button {control.name!r} is {row[column]!r}; it must be 0 or 1"
                )
            held += [number] * bit
        return _as_bits(held)


def _by_name(names: Iterable[str]) -> dict[str, int]:
    """Numbers by name, and by name in lower case where that is unambiguous."""
    names = list(names)
    folded = [name.casefold() for name in names]
    clear = {name: i for i, name in enumerate(folded) if folded.count(name) == 1}
    return clear | {name: i for i, name in enumerate(names)}


def _as_bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in set(numbers))


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def _bit(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().casefold() in _BITS:
        return _BITS[value.strip().casefold()]
    number = _whole(value.strip() if isinstance(value, str) else value)
    return number if number in (0, 1) else None


def _from_array(path: Path, known: Controls) -> np.ndarray:
    actions = npz.read(path, ["actions"])["actions"]
    if actions.ndim == 2 and known.encoding == "buttons":
        if actions.shape[1] != len(known.controls) or not np.isin(actions, (0, 1)).all():
            raise UserError(
                f"{path}: actions are {actions.shape}; {len(known.controls)} buttons need 0 and 1 "
                f"in [T, {len(known.controls)}]"
            )
        actions = (actions.astype(np.int32) << np.arange(actions.shape[1])).sum(axis=1)
    if actions.ndim == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.dtype.kind == "f" and (actions == np.round(actions)).all():  # had a gap
        actions = actions.clip(-1, known.num_values).astype(np.int32)
    if actions.ndim != 1 or actions.dtype.kind not in "iu" or not len(actions):
        raise UserError(f"{path}: actions are {actions.dtype} {actions.shape}, not integers [T]")
    if wrong := actions[(actions < 0) | (actions >= known.num_values)].tolist():
        raise UserError(f"{path}: action {wrong[0]}; they must be 0…{known.num_values - 1}")
    return actions.astype(np.int32)
