"""metrics.jsonl is append-only, ordered, and consistent after any crash."""

import json
import math

import numpy as np
import pytest

from cwm_jax.errors import UserError
from cwm_jax.experiment.metrics_file import MetricsFile, read_series


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, steps, resume_step=None):
    file = MetricsFile(path, resume_step=resume_step)
    for step in steps:
        file.scalars(step, {"train/loss": 1 / step})
    file.close()


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_one_object_and_is_written_at_once(path):
    file = MetricsFile(path)
    file.scalars(7, {"train/loss": 0.25, "train/lr": 1e-4})
    assert path.read_text() == '{"step": 7, "train/loss": 0.25, "train/lr": 0.0001}\n'
    file.close()


def test_a_resumed_run_has_each_step_once_and_in_order(path):
    write(path, range(1, 18))
    kept = path.read_bytes().splitlines(keepends=True)[:11]
    write(path, range(12, 24), resume_step=11)
    assert steps_in(path) == list(range(1, 24))
    assert path.read_bytes().splitlines(keepends=True)[:11] == kept


def test_resuming_without_a_crash_only_appends(path):
    write(path, [1, 2, 3])
    before, inode = path.read_bytes(), path.stat().st_ino
    write(path, [4], resume_step=3)
    assert path.read_bytes().startswith(before)
    assert path.stat().st_ino == inode
    assert steps_in(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 31, 3))
def test_a_truncated_last_line_is_removed(path, cut):
    write(path, [1, 2, 3])
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    write(path, [4, 5], resume_step=3)
    assert steps_in(path) in ([1, 2, 4, 5], [1, 2, 3, 4, 5])
    assert (3 in steps_in(path)) == (cut == 1)  # only the newline was lost: the line is whole


def test_a_new_run_starts_with_no_lines(path):
    write(path, [1, 2, 3])
    write(path, [1, 2])
    assert steps_in(path) == [1, 2]


def test_a_crash_while_removing_lines_loses_nothing(path, monkeypatch):
    write(path, [1, 2, 3])
    before = path.read_bytes()

    def power_cut(*args):
        raise OSError(5, "power cut")

    monkeypatch.setattr("os.replace", power_cut)
    with pytest.raises(UserError, match="power cut"):
        MetricsFile(path, resume_step=1)
    assert path.read_bytes() == before


def test_an_invalid_line_in_the_middle_is_named(path, capsys):
    write(path, [1])
    with path.open("a") as file:
        file.write('{"step": 2, "tr\n[3]\n{"step": 4, "train/loss": 1}\n')
    write(path, [5], resume_step=4)
    assert steps_in(path) == [1, 4, 5]
    errors = capsys.readouterr().err
    assert "line 2" in errors
    assert "line 3" in errors


def test_values_that_are_not_finite_become_null_and_are_read_as_nan(path):
    file = MetricsFile(path)
    for step, value in enumerate([math.nan, math.inf, -math.inf, 0.5]):
        file.scalars(step, {"train/loss": value})
    file.media(9, "rollout/video", path.parent / "video.mp4", "video")
    file.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert [line.get("train/loss") for line in lines[:4]] == [None, None, None, 0.5]
    assert lines[4] == {"step": 9, "rollout/video": str(path.parent / "video.mp4")}
    series = read_series(path)
    assert list(series) == ["train/loss"]  # paths are not numbers
    np.testing.assert_array_equal(series["train/loss"], ([0, 1, 2, 3], [math.nan] * 3 + [0.5]))


def test_a_running_file_can_be_read(path):
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    steps, values = read_series(path)["train/loss"]
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [1, 0.5]


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_series(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=str(tmp_path)):
        MetricsFile(tmp_path)


class FullDisk:
    """A file that takes `room` bytes, and then no more until there is room again."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, text):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(text[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 1, 17, 60])
def test_lines_are_kept_while_the_disk_is_full(path, capsys, room):
    file = MetricsFile(path)
    file._file = full = FullDisk(file._file, room)
    for step in range(1, 5):
        file.scalars(step, {"train/loss": 0.25})
    assert path.stat().st_size <= room
    assert capsys.readouterr().err.count("No space left") == 1
    full.room = 10**6
    file.scalars(5, {"train/loss": 0.25})
    file.close()
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_names_reported_at_the_resumed_step_are_not_reported_again(path):
    write(path, [1, 2, 3])
    file = MetricsFile(path, resume_step=2)
    file.scalars(2, {"train/loss": 9.0, "val/loss": 0.5})
    file.close()
    text = [json.loads(line) for line in path.read_text().splitlines()]
    assert text == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
        {"step": 2, "val/loss": 0.5},
    ]
