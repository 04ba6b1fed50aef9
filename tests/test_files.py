"""Files are written atomically, and users' paths and texts are read."""

import contextlib
import errno
import resource
from pathlib import Path

import numpy as np
import pytest

from cwm_jax import files
from cwm_jax.checkpoints import weights
from cwm_jax.data import npz
from cwm_jax.errors import UserError
from cwm_jax.files import written_whole
from cwm_jax.rendering import video


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


@contextlib.contextmanager
def small_disk(kib):
    """No file may become larger than this, as on a disk with so much space left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _frames():
    return list(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.mp4", lambda path: video.write_video(path, _frames(), fps=5)),
        ("a.gif", lambda path: video.write_video(path, _frames(), fps=5)),
        ("a.png", lambda path: video.write_png(path, _frames()[0])),
        ("a.npz", lambda path: npz.write(path, {"frames": np.stack(_frames())})),
        ("a.safetensors", lambda path: weights.write(path, {"a": np.ones(9999, np.float32)}, {})),
    ],
)
def test_every_writer_names_the_file_on_a_full_disk_and_leaves_nothing(name, write, tmp_path):
    with small_disk(2), pytest.raises(UserError, match=f"cannot write {tmp_path / name}: File too"):
        write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def raising(error, path):
    with written_whole(path):
        raise error


def test_a_full_disk_is_told_from_errors_of_other_files(tmp_path):
    path = tmp_path / "notes.txt"
    full = OSError(errno.ENOSPC, "No space left on device")
    rust = ValueError("I/O error: No space left on device (os error 28)")
    for error in (full, rust):
        with pytest.raises(UserError, match=f"cannot write {path}: No space left on device$"):
            raising(error, path)
    for error in (
        FileNotFoundError(errno.ENOENT, "none", "data.npz"),
        OSError(errno.EROFS, "another file", "data.npz"),
        ValueError("I/O error: no such file (os error 2)"),
    ):
        with pytest.raises(type(error)):
            raising(error, path)
    assert not list(tmp_path.iterdir())


def test_outputs_are_checked_before_the_work_and_nothing_is_created(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check = lambda *outputs: files.check_outputs(
        *((flag, path and tmp_path / path, suffixes) for flag, path, suffixes in outputs)
    )
    one, two = (".mp4",), (".mp4", ".gif")
    check(("--a", "new/a.MP4", one), ("--b", "b.gif", two), ("--c", None, one))
    for outputs, message in (
        ([("--a", "a.mp4", one), ("--b", "x/../a.mp4", one)], "same file as that of --a"),
        ([("--a", "a.mp4", one), ("--b", "link.mp4", one)], "--b .*link.mp4 is the same file"),
        ([("--a", "a.png", two)], "--a .*a.png: its name must end in .mp4 or .gif"),
        ([("--a", "a", one)], "--a .*a: its name must end in .mp4"),
        ([("--a", "folder.mp4", one)], "cannot write .*folder.mp4: it is a folder"),
        ([("--a", "file/new/a.mp4", one)], "cannot write .*file/new/a.mp4: Not a directory"),
        ([("--a", f"{'a' * 300}.mp4", one)], "cannot write .*: File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            check(*outputs)
    assert sorted(tmp_path.rglob("*")) == before


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
