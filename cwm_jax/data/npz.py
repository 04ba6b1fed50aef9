"""Writes .npz files, and reads those that may be damaged or of another format."""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from cwm_jax.errors import UserError
from cwm_jax.files import written_whole

SUFFIX = ".npz"


def read(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays with these names; others are not unpacked.

    Raises:
        UserError: the file cannot be read, or lacks one of them.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no complete .npz archive")
            loaded = np.load(file)
            arrays = {name: loaded[name] for name in names}
        if wrong := [name for name in names if not isinstance(arrays[name], np.ndarray)]:
            raise ValueError(f"its {wrong[0]} is no array")
    except Exception as error:  # damaged files raise many types, from zlib's to a tokenizer's
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from None
    return arrays


def write(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes arrays by name, compressed and atomically, under exactly this path.

    Raises:
        UserError: `path` cannot be written.
    """
    # NumPy appends .npz to other paths, but not to an open file.
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
