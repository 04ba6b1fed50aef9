"""Files are written atomically, and users' paths and texts are read."""

from pathlib import Path

import pytest

from cwm_jax import files
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


def test_a_folder_or_a_path_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write {path}"), written_whole(path):
            pass


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://b/x", "hf://a/b", "file:///tmp/x"])
def test_a_url_is_not_a_path(address):
    with pytest.raises(UserError, match=rf"--output {address}: URLs are not supported"):
        files.local_path(address, "--output")


def test_a_tilde_is_the_home_folder_and_other_names_are_unchanged(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path("~/runs/x", "--workdir") == tmp_path / "runs" / "x"
    for name in ("a~b/~", "a:b/c", "gs:/x", "./~"):
        assert files.local_path(name, "--workdir") == Path(name)
    with pytest.raises(UserError, match="--workdir ~nobody-here/x: there is no such home"):
        files.local_path("~nobody-here/x", "--workdir")


def test_user_texts_are_read_with_and_without_a_byte_order_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a").write_bytes("größe\r\n跳".encode(encoding))
        assert files.read_text(tmp_path / "a") == "größe\r\n跳"
    (tmp_path / "a").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        files.read_text(tmp_path / "a")
