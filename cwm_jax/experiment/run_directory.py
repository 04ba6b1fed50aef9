"""A run's workdir: created, checked for links, and locked by one run at a time."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from cwm_jax.errors import UserError

LEAVING_SECONDS = 60  # time for a previous run to stop when it is started again


def make(workdir: Path) -> None:
    """Creates the folder. Raises `UserError` where that fails, or where links lead out of it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}") from None
    for path in workdir.rglob("*"):  # W&B creates links of its own
        if path.is_symlink() and workdir / "wandb" not in path.parents:
            raise UserError(
                f"{path} is a link, and a run writes only inside its workdir: replace it by its "
                f"target, or remove it"
            )


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Excludes other runs during the block: they would delete checkpoints that this one saves.

    Uses a lock on `.lock`, which the system releases when the process ends. On a disk without
    locks, other runs are not excluded.

    Raises:
        UserError: another run holds the lock for `LEAVING_SECONDS`, or nothing can be written.
    """
    try:
        lock = (workdir / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write in {workdir}: {error.strerror}") from None
    with lock:
        _wait_for(lock, workdir)
        yield


def _wait_for(lock, workdir: Path) -> None:
    deadline = time.monotonic() + LEAVING_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"another run has been using {workdir} for at least {LEAVING_SECONDS} "
                    f"seconds: stop it, or name another --workdir"
                ) from None
            time.sleep(0.2)
        except OSError:  # the disk has no locks
            return None
