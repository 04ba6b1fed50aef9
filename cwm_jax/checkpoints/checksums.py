"""A folder's files and their SHA-256, as `sha256sum` writes and checks them.

cd FOLDER && sha256sum --check --quiet SHA256SUMS
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from cwm_jax import files
from cwm_jax.files import written_whole

NAME = "SHA256SUMS"
_THREADS = 4  # hashing releases the GIL


def write(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Writes `SHA256SUMS` of the wanted files in and under `folder`, atomically.

    Args:
        wanted: whether to include a file, by its path in the folder.
    """
    names = [name for name in _files(folder) if wanted(name)]
    lines = [f"{digest}  {name}\n" for name, digest in _digests(folder, names)]
    with written_whole(folder / NAME) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def fault(folder: Path, *, within: tuple[str, ...] = ()) -> str | None:
    """The first fault of the folder's files; None where all checksums match.

    A path in `SHA256SUMS` is only compared with the paths in the folder, never opened.

    Args:
        within: check only files under these names in the folder; all by default.
    """
    try:
        expected = _read(folder / NAME)
        present = set(_files(folder))
        names = [n for n in sorted(expected) if not within or n.split("/")[0] in within]
        if missing := [name for name in names if name not in present]:
            return f"{missing[0]} is missing"
        for name, digest in _digests(folder, names):
            if digest != expected[name]:
                return f"{name} has changed since it was saved"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except ValueError:  # also a text that is not UTF-8
        return f"{NAME} is damaged"
    return None


def _read(path: Path) -> dict[str, str]:
    expected = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or ".." in PurePosixPath(name).parts:
            raise ValueError(line)
        expected[name] = digest
    if not expected:
        raise ValueError("no lines")
    return expected


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digests(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: files.sha256(folder / name), names)
        yield from zip(names, digests, strict=True)
