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
    decides the format of many writers.

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
