"""Files and folders of this machine: paths, atomic writing, reading of text and JSON."""

import argparse
import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwm_jax.errors import UserError

SAFETENSORS = ".safetensors"
MODEL_FILE = f"model{SAFETENSORS}"  # in a folder that holds a model and what is known of it
HUB = "hf://"  # begins the name of a model on the Hugging Face Hub
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # ends messages of libraries written in Rust
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Files that desktops, network drives and file systems create.
_NOT_THE_USERS = {
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"),
    *("$recycle.bin", "system volume information"),
}


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block succeeds.

    Readers see the old file or the whole new one; if the block raises, the temporary file is
    deleted. Missing folders are created. The temporary name keeps the suffix of `path`, which
    decides the format of many writers; those that append a suffix need an open file instead.

    Raises:
        UserError: `path` cannot be written, or the disk is full before its end.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _touch(path, temporary)
    except OSError as error:
        raise _cannot_write(path, error.errno, error.strerror) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        if number := _failed_write(error, temporary):
            raise _cannot_write(path, number, os.strerror(number)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.stem}.{os.getpid()}{path.suffix}"


def _touch(path: Path, temporary: Path) -> None:
    """Creates `temporary`, unless `path` is a folder, which no file can replace."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    temporary.touch()


def _failed_write(error: Exception, temporary: Path) -> int | None:
    """The `errno` if `error` is of the disk or of the temporary file, else None."""
    if isinstance(error, OSError):
        if error.filename is not None:
            ours = os.path.basename(str(error.filename)) == temporary.name
            return error.errno if ours else None
        number = error.errno
    else:
        found = _RUST_ERROR.search(str(error))
        number = int(found[1]) if found else None
    return number if number in {*_DISK_FULL, errno.EROFS} else None


def _cannot_write(path: Path, number: int | None, reason: str | None) -> UserError:
    advice = "" if number in _DISK_FULL else "; name a file in a folder you may write to"
    return UserError(f"cannot write {path}: {reason}{advice}")


def check_writable(path: Path) -> None:
    """Raises `UserError` if `written_whole` would; no file or folder is left."""
    temporary = _temporary(path)
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        temporary = folder / temporary.name
        _touch(path, temporary)
        temporary.unlink()
    except OSError as error:
        raise _cannot_write(path, error.errno, error.strerror) from error


def check_outputs(*outputs: tuple[str, Path | None, tuple[str, ...]]) -> None:
    """Checks the files that a program is going to write, before its work begins.

    Args:
        outputs: for each file its flag, its path (None: it is not wanted), and the suffixes that
            its writer supports, in lower case.

    Raises:
        UserError: a path has another suffix, two are the same file, or one cannot be written.
    """
    taken: dict[str, str] = {}
    for flag, path, suffixes in outputs:
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{flag} {path}: its name must end in {' or '.join(suffixes)}")
        other = taken.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise UserError(f"{flag} {path} is the same file as that of {other}; name two files")
        check_writable(path)


def local_path(text: str, where: str) -> Path:
    """A path as users write it: `~` is the home folder; URLs are refused.

    Args:
        where: the flag or setting that holds it, for the error.

    Raises:
        UserError: it is a URL such as gs://…, or the home folder of an unknown user.
    """
    if _ADDRESS.match(text):
        raise UserError(
            f"{where} {text}: URLs are not supported; name a file or folder of this machine, or "
            "of a mounted disk"
        )
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise UserError(
            f"{where} {text}: there is no such home folder; write the path, or ./{text}"
        )
    return Path(expanded)


def path_flag(text: str) -> Path:
    """`local_path` as the `type` of an argparse flag, which names the flag itself."""
    try:
        return local_path(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None


def model_flag(text: str) -> Path | str:
    """`path_flag` where a model is asked for: its name on the hub, hf://…, stays as it is."""
    return text if text.startswith(HUB) else path_flag(text)


def is_visible(path: Path) -> bool:
    """Whether a file or folder is the user's: neither hidden nor created by a desktop."""
    return not path.name.startswith(".") and path.name.lower() not in _NOT_THE_USERS


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The files and folders in a folder that are `is_visible`, sorted by name."""
    return sorted(path for path in folder.glob(pattern) if is_visible(path))


def sha256(path: Path) -> str:
    """A file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_digest(folder: Path) -> str:
    """Distinguishes folders of the same name without revealing their paths."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A user's text file with its line ends: UTF-8, or UTF-16 with a byte order mark.

    A byte order mark, which spreadsheets, editors and shells write, is removed.

    Raises:
        OSError: it cannot be read.
        ValueError: it has another encoding.
    """
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(_UTF_16) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} ({raw[error.start]:#04x}) is not {encoding}: save it as UTF-8"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a user's file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        fault = "it is empty" if _is_empty(path) else error
        raise UserError(f"{path} cannot be read as JSON: {fault}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0
