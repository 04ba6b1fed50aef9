"""Files and folders of this machine: as people name, write and keep them.

A file is written whole or not at all.
"""

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
# What desktops, network drives and file systems put among anybody's files.
_NOT_THE_USERS = {
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"),
    *("$recycle.bin", "system volume information"),
}


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


def local_path(text: str, where: str) -> Path:
    """A path as a person writes it: `~` is a home folder; an address is refused.

    Args:
        where: the flag or setting that holds it, for the error.

    Raises:
        UserError: it is an address such as gs://…, or of a user who does not exist.
    """
    if _ADDRESS.match(text):
        raise UserError(
            f"{where} {text}: addresses are not supported; name a file or folder of this machine, "
            "on a mounted disk where it is to be elsewhere"
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
    """Whether a file or folder is a person's own, and no hidden one or one that a desktop made."""
    return not path.name.startswith(".") and path.name.lower() not in _NOT_THE_USERS


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder and `is_visible`, in order of name."""
    return sorted(path for path in folder.glob(pattern) if is_visible(path))


def place_digest(folder: Path) -> str:
    """Tells one folder from another of the same name, without giving its path away."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text from outside, with all its line ends: UTF-8, or UTF-16 with its mark.

    Spreadsheets, editors and shells begin a text with a byte order mark, which is left out.

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
            f"byte {error.start} ({raw[error.start]:#04x}) is no {encoding}: save it as UTF-8"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file from outside.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or holds something else.
    """
    try:
        said = json.loads(read_text(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        fault = "it is empty" if _is_empty(path) else error
        raise UserError(f"{path} cannot be read as JSON: {fault}") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} holds a {type(said).__name__}; it must be a JSON object")
    return said


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0
