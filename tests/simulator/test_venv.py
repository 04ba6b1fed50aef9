"""The simulator's environment uses a Python with wheels, or an error is raised at once."""

import shutil
import stat
import sys
from pathlib import Path

import pytest

from cwm_jax.errors import UserError
from cwm_jax.simulator import venv
from cwm_jax.tools import doctor

THIS = sys.executable


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def newer(monkeypatch, tmp_path):
    """As on a machine whose only Python is too new: nothing on PATH, no pyenv, no uv."""
    monkeypatch.setattr(sys, "executable", program(tmp_path / "own" / "python", "exit 1"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def test_the_running_python_is_used_if_its_version_fits():
    if sys.version_info[:2] in venv.PYTHONS:
        assert venv.find_maker() == [THIS, "-m", "venv"]


def test_another_python_is_found_where_the_running_one_is_too_new(newer):
    in_pyenv = program(newer / "pyenv" / "versions" / "3.11.7" / "bin" / "python", "exit 0")
    assert venv.find_maker() == [in_pyenv, "-m", "venv"]
    program(newer / "bin" / "python3.12", "exit 127")  # pyenv's, for a version it does not have
    on_path = program(newer / "bin" / "python3.11", "exit 0")
    assert venv.find_maker() == [on_path, "-m", "venv"]


def test_uv_downloads_a_python_if_there_is_none(newer):
    uv = program(newer / "bin" / "uv", "exit 0")
    assert venv.find_maker()[:2] == [uv, "venv"]
    assert "3.12" in venv.find_maker()


def test_a_missing_python_is_reported_before_anything_is_created(newer):
    with pytest.raises(UserError, match=r"only for Python 3\.12 or 3\.11"):
        venv.ensure(newer / "environment")
    assert not (newer / "environment").exists()


def test_missing_libraries_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    names = {"libnothing-9.so.1": "libnothing9", "libnowhere.so.2": "libnowhere2"}
    monkeypatch.setattr(venv, "LIBRARIES", names)
    (tmp_path / venv._DONE).write_text(venv.REQUIREMENTS.read_text())
    python_of(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"libnothing-9\.so\.1, .*libnowhere2"):
        venv.ensure(tmp_path)
    found = doctor.simulator(tmp_path)
    assert found.status == doctor.BAD
    assert "apt-get install -y libnothing9 libnowhere2" in found.mend
    assert doctor.simulator(tmp_path / "none").status == doctor.NOTE


def test_present_libraries_are_not_missing(monkeypatch):
    monkeypatch.setattr(venv, "LIBRARIES", {"libc.so.6": "libc6"})
    assert venv.missing_libraries(Path(sys.executable)) == []


def test_an_environment_may_bring_libraries_of_its_own(monkeypatch, tmp_path):
    """As one in a container that lacks them, whose Python finds them in its own folder."""
    monkeypatch.setattr(venv, "LIBRARIES", {"libnothing-9.so.1": "libnothing9"})
    (tmp_path / venv._DONE).write_text(venv.REQUIREMENTS.read_text())
    own = tmp_path / "own"
    own.mkdir()
    python = python_of(tmp_path, own)
    with pytest.raises(UserError, match="libnothing-9"):
        venv.ensure(tmp_path)
    loaded = Path("/proc/self/maps").read_text().split()
    shutil.copy(next(word for word in loaded if "/libm.so" in word), own / "libnothing-9.so.1")
    assert venv.ensure(tmp_path) == python
    assert doctor.simulator(tmp_path).status == doctor.OK


def python_of(environment: Path, libraries: Path) -> Path:
    """A Python of an environment that looks for libraries in a folder too."""
    python = environment / "bin" / "python"
    program(python, f'LD_LIBRARY_PATH={libraries} exec {sys.executable} "$@"')
    return python
