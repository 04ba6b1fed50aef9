"""The browser's ONNX runtime: one pinned package of npm, checked and unpacked."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from cwm_jax.errors import UserError
from cwm_jax.runtime import user_cache

NAME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02V"
    "b7QmRMDs1SigqR4CXAfKYQ=="
)
# Name of each file on the page, and its path in the package.
FILES = {
    "ort.wasm.mjs": "dist/ort.wasm.min.mjs",
    "ort-wasm.mjs": "dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "dist/ort-wasm-simd-threaded.wasm",
    "ort.webgpu.mjs": "dist/ort.webgpu.min.mjs",
    "ort-webgpu.mjs": "dist/ort-wasm-simd-threaded.asyncify.mjs",
    "ort-webgpu.wasm": "dist/ort-wasm-simd-threaded.asyncify.wasm",
}


def files(archive: Path | None = None) -> dict[str, bytes]:
    """The files of the runtime by the page's names.

    Args:
        archive: the package's .tgz; fetched with npm by default, and stored in the user's cache.

    Raises:
        UserError: npm is missing or fails, or the archive is not the pinned one.
    """
    with tarfile.open(checked(archive)) as tar:
        return {name: tar.extractfile(f"package/{where}").read() for name, where in FILES.items()}


def checked(archive: Path | None = None) -> Path:
    """The package's .tgz with the pinned checksum; arguments and errors as `files`."""
    path = archive or _fetched()
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the .tgz of {NAME} {VERSION}")
    if _integrity(path) != INTEGRITY:
        raise UserError(
            f"{path} is not {NAME} {VERSION}: its checksum is {_integrity(path)[:23]}…, and the "
            f"pinned one {INTEGRITY[:23]}…; delete it to fetch it again"
        )
    return path


def _fetched() -> Path:
    file = f"{NAME}-{VERSION}.tgz"
    cache = user_cache.folder() or Path(tempfile.gettempdir()) / "cwm_jax"
    folder = cache / "npm"
    if (folder / file).is_file():
        return folder / file
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"the page's runtime is fetched with npm, which is not installed: install Node.js, or "
            f"name the archive of {NAME} {VERSION} with --runtime"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"{NAME}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode or not (folder / file).is_file():
        why = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"npm could not fetch {NAME} {VERSION}: {why[0]}")
    return folder / file


def _integrity(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode()
