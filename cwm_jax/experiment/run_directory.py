"""A run's workdir: made, free of links, and held by one run at a time."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from cwm_jax.errors import UserError

LEAVING_SECONDS = 60  # so long a run may take to stop where it is begun again meanwhile


def make(workdir: Path) -> None:
    """Makes the folder. Raises `UserError` where it cannot be, or where links lead out of it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}") from None
    for path in workdir.rglob("*"):  # W&B makes links of its own
        if path.is_symlink() and workdir / "wandb" not in path.parents:
            raise UserError(
                f"{path} is a link, and a run writes only inside its workdir: put what it points "
                f"at in its place, or take it away"
            )


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps other runs out while the block lasts: they would delete what this one is saving.

    By a lock on `.lock`, which the system takes away from a process that ends, however it ends. On
    a disk without locks nobody is kept out.

    Raises:
        UserError: another run is there, after `LEAVING_SECONDS` still, or nothing can be written.
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
                    f"another run is at work in {workdir}, since {LEAVING_SECONDS} seconds at "
                    f"least: stop it, or name another --workdir"
                ) from None
            time.sleep(0.2)
        except OSError:  # no locks here
            return None
