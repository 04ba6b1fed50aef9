"""Records that a data folder lacks are recorded, once there is room and a game."""

import json

import pytest

from cwm_jax.errors import UserError
from cwm_jax.runtime import subprograms
from cwm_jax.simulator import missing_records


@pytest.fixture
def programs(monkeypatch):
    """The arguments of the programs that would run, and `programs.code`, what they end with."""

    class Programs(list):
        code = 0

        def __call__(self, words, **_):
            self.append(words)
            return self.code

    found = Programs()
    monkeypatch.setattr(subprograms, "run", found)
    return found


def recorded(folder, *, train, frames):
    """As `cwm_jax.tools.collect` leaves it."""
    held = {"records": 200, "wanted": 200, "frames": 1}
    splits = {"train": dict(records=train, wanted=train, frames=frames), "val": held, "test": held}
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"recipe": {}, "splits": splits}))


def test_missing_records_are_recorded(tmp_path, programs):
    recorded(tmp_path / "data", train=300, frames=35_000)
    missing_records.record(tmp_path / "data", 30_000)
    assert not programs
    missing_records.record(tmp_path / "data", 40_000)
    words = " ".join(programs[0])
    assert "--train 400 --val 200 --test 200" in words


def test_without_the_game_and_data_the_alternatives_are_reported(tmp_path, programs):
    programs.code = 2
    with pytest.raises(
        UserError, match=r"0 of 100 records.*\n?.*make install-procgen.*DATA=FOLDER"
    ):
        missing_records.record(tmp_path / "data", 100)


def test_too_little_disk_is_reported_before_recording(tmp_path, programs):
    with pytest.raises(UserError, match=r"FRAMES=1000000000000 .* GB are free"):
        missing_records.record(tmp_path / "data", 10**12)
    assert not programs
