"""Compiled programs are kept by default, and JAX's own settings take precedence."""

from pathlib import Path

import jax
import pytest

from cwm_jax.runtime import compile_cache


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.enable()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "cwm_jax" / "xla"
    compile_cache.enable(str(tmp_path / "elsewhere"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "elsewhere")
    compile_cache.enable("gs://bucket/programs")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"
    compile_cache.enable("")
    assert jax.config.jax_compilation_cache_dir is None


def test_jaxs_own_folder_is_respected(monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "jaxs_own")
    monkeypatch.setenv(compile_cache.VARIABLE, "jaxs_own")
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == "jaxs_own"


def no_account(*_):
    raise KeyError("uid not found")


def test_without_a_home_folder_nothing_is_kept(monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    assert compile_cache.folder() is None
    assert "no home folder" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["the user's cache", "the flag"])
def test_a_folder_that_cannot_be_written_is_logged_and_nothing_is_kept(
    monkeypatch, tmp_path, capsys, how
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cache.enable("auto" if how == "the user's cache" else str(tmp_path / "file" / "xla"))
    assert jax.config.jax_compilation_cache_dir is None
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_jaxs_own_minimum_compile_time_is_respected(monkeypatch, tmp_path):
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    monkeypatch.delenv(setting.upper(), raising=False)
    compile_cache.enable(str(tmp_path), everything=True)
    assert getattr(jax.config, setting) == 0
    jax.config.update(setting, before)
    monkeypatch.setenv(setting.upper(), str(before))
    compile_cache.enable(str(tmp_path), everything=True)
    assert getattr(jax.config, setting) == before
