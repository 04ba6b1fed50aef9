"""Creates the simulator's Python environment, `.venv-procgen` next to the project's `.venv`."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.errors import UserError, echo
from cwm_jax.runtime import network, user_cache

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PYTHONS = ((3, 12), (3, 11))  # with wheels of Procgen; the first found is used
LIBRARIES = {  # that Procgen loads and pip does not install, with their Debian packages
    "libGL.so.1": "libgl1",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libX11.so.6": "libx11-6",
}
_COMPILED = (
    "cffi,glcontext,moderngl,numpy,pillow,procgen-mirror"  # takes minutes to build, or fails
)
_DONE = ".installed"  # contains the installed requirements; absent if installing was interrupted


def default_folder() -> Path:
    """The folder next to the running virtual environment, or in the current folder if none.

    For an installed package it is in the user's cache: its own environment may be deleted.
    """
    if not shipped.is_checkout() and (kept := user_cache.folder()):
        return kept / "procgen"
    home = Path(sys.prefix).parent if sys.prefix != sys.base_prefix else Path.cwd()
    return home / ".venv-procgen"


def is_ready(folder: Path) -> bool:
    """Whether `folder` has an environment with the present requirements."""
    done = folder / _DONE
    return done.is_file() and done.read_text(encoding="utf-8") == REQUIREMENTS.read_text(
        encoding="utf-8"
    )


def ensure(folder: Path | None = None) -> Path:
    """The environment's Python; the environment is created by pip if it is not ready.

    Takes half a minute the first time. If interrupted, it starts again at the next call; two
    simultaneous calls create one environment.

    Raises:
        UserError: no Python here can run Procgen, the packages cannot be installed (with pip's last
            line), or libraries of the system are missing.
    """
    folder = (folder or default_folder()).absolute()
    if not is_ready(folder):  # a ready one may be another user's, and not writable
        _make_alone(folder)
    python = folder / "bin" / "python"
    if missing := missing_libraries(python):
        raise UserError(
            f"Procgen needs {', '.join(missing)}, which this system lacks: "
            f"{install_command(missing)}"
        )
    return python


def _make_alone(folder: Path) -> None:
    """Creates it, unless another process does so meanwhile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(folder.name + ".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(folder):
                _make(folder)
    except OSError as error:
        raise UserError(f"cannot make an environment in {folder}: {error.strerror}") from None


def missing_libraries(python: Path) -> list[str]:
    """Those of `LIBRARIES` that a Python cannot load, which may bring some of its own.

    None where that Python does not run, which is another fault.
    """
    if not _answers([str(python), "-c", "import ctypes"]):
        return []
    load = "import ctypes, sys\nctypes.CDLL(sys.argv[1])"
    tries = {name: [str(python), "-c", load, name] for name in LIBRARIES}
    return [name for name, words in tries.items() if not _answers(words)]


def install_command(missing: Sequence[str]) -> str:
    """The command that installs libraries on Debian and Ubuntu."""
    packages = sorted({LIBRARIES[name] for name in missing})
    return f"apt-get install -y {' '.join(packages)}  (as root)"


def find_maker() -> list[str]:
    """The command that creates an environment of a Python with wheels of Procgen.

    The running Python if its version fits, else one from PATH, from pyenv, or from uv, which
    downloads one if necessary.

    Raises:
        UserError: there is none.
    """
    for python in _candidates():
        if _answers([python, "-c", _IS_ONE]):
            return [python, "-m", "venv"]
    if uv := shutil.which("uv"):
        return [uv, "venv", "--quiet", "--seed", "--python", _dotted(PYTHONS[0])]
    wanted = " or ".join(map(_dotted, PYTHONS))
    raise UserError(
        f"Procgen has wheels only for Python {wanted}, and this is Python "
        f"{_dotted(sys.version_info[:2])}. None of those, with its venv, is on PATH or in pyenv: "
        "install one (pyenv install 3.12, or apt-get install python3.12-venv), or install uv, "
        "which downloads one"
    )


_IS_ONE = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in {PYTHONS})"


def _candidates() -> Iterator[str]:
    yield sys.executable
    names = [f"python{_dotted(version)}" for version in PYTHONS]
    yield from filter(None, map(shutil.which, [*names, "python3"]))
    pyenv = Path(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")) / "versions"
    for version in PYTHONS:
        yield from map(str, sorted(pyenv.glob(f"{_dotted(version)}*/bin/python")))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _answers(words: Sequence[str]) -> bool:
    """Whether a program runs and exits with 0."""
    try:
        return not subprocess.run(words, capture_output=True, check=False, timeout=60).returncode
    except (OSError, subprocess.SubprocessError):
        return False


def _make(folder: Path) -> None:
    if wrong := network.faults():
        raise UserError("pip cannot reach its index: " + "; ".join(wrong))
    maker = find_maker()
    echo(f"creating the simulator's environment in {folder} (once)")
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} exists and is no virtual environment; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    _run(folder, [*maker, str(folder)])
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(folder, [*install, "--only-binary", _COMPILED, "-r", str(REQUIREMENTS)])
    (folder / _DONE).write_text(REQUIREMENTS.read_text(encoding="utf-8"), encoding="utf-8")


def _run(folder: Path, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(
            f"cannot create the simulator's environment in {folder}: {lines[-1]}\n"
            "Procgen has wheels for Python 3.11 and 3.12 on Linux (x86-64), and pip must reach "
            "its index."
        )
