"""Compiled programs are kept unless somebody says otherwise."""

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
    compile_cache.enable("elsewhere")
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    compile_cache.enable("")
    assert jax.config.jax_compilation_cache_dir is None


def test_what_jax_was_told_stays(monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "jaxs_own")
    monkeypatch.setenv(compile_cache.VARIABLE, "jaxs_own")
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == "jaxs_own"
