"""Makes the simulator's own Python environment, `.venv-procgen` beside the project's `.venv`."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

from cwm_jax.errors import UserError, tell

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_DONE = ".installed"  # holds the requirements that were installed; absent if that broke off


def default_folder() -> Path:
    """Beside the running virtual environment; in the current folder where there is none."""
    home = Path(sys.prefix).parent if sys.prefix != sys.base_prefix else Path.cwd()
    return home / ".venv-procgen"


def is_ready(folder: Path) -> bool:
    """Whether `folder` holds an environment with the present requirements."""
    done = folder / _DONE
    return done.is_file() and done.read_text(encoding="utf-8") == REQUIREMENTS.read_text(
        encoding="utf-8"
    )


def ensure(folder: Path | None = None) -> Path:
    """The environment's Python; the environment is made, by pip, where it is not ready.

    Takes half a minute the first time. Broken off, it starts anew at the next call; two calls at
    once make one environment.

    Raises:
        UserError: the packages cannot be had, with pip's last word.
    """
    folder = (folder or default_folder()).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(folder.name + ".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(folder):
                _make(folder)
    except OSError as error:
        raise UserError(f"cannot make an environment in {folder}: {error.strerror}") from None
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    tell(f"making the simulator's environment in {folder} (once)")
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} is there and is no virtual environment; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    _run(folder, [sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(folder, [*install, "-r", str(REQUIREMENTS)])
    (folder / _DONE).write_text(REQUIREMENTS.read_text(encoding="utf-8"), encoding="utf-8")


def _run(folder: Path, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(
            f"cannot make the simulator's environment in {folder}: {lines[-1]}\n"
            "Procgen has wheels for Python 3.11 and 3.12 on Linux (x86-64), and pip must reach "
            "its index."
        )
