"""Writing a file whole or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cwm_jax.errors import UserError


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and renames it to `path` when the block succeeds.

    A reader sees the old file or the new one, never half of one; if the block raises, nothing is
    left behind. Missing folders are made. The temporary name keeps the suffix of `path`, since
    many writers go by it.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        temporary.touch()
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; name a file in a folder you may write to"
        ) from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
