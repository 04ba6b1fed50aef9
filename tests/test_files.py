"""A file is written whole or not at all."""

import pytest

from cwm_jax.errors import UserError
from cwm_jax.files import written_whole


def test_the_new_file_replaces_the_old_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    path.parent.mkdir()
    path.write_text("old")
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def fail_half_way():
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_path_below_a_file_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write {path}"), written_whole(path):
            pass
