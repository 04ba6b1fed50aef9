"""Checks this machine, and prints the command that fixes each problem.

    python -m cwm_jax.tools.doctor --data data/coinrun

`ok`: no problem; `note`: a limitation; `BAD`: something does not work. The exit code is 1 if
anything is bad.
"""

import argparse
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cwm_jax import shipped
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.runtime import network, user_cache

OK, NOTE, BAD = "ok", "note", "BAD"
_GB = 1e9
_REINSTALL = "pip install --force-reinstall cwm_jax-….whl"
_FILES_WANTED = 8192  # a reader keeps a file open for each shard; the public dataset has 6,129
_SHARED_WANTED = 1 * _GB  # for batches of reading processes


class Finding(NamedTuple):
    """The result of one check: its status, the observation, and the command that fixes it."""

    status: str
    what: str
    mend: str = ""


def _how(in_checkout: str, installed: str) -> str:
    return in_checkout if shipped.is_checkout() else installed


def files() -> Finding:
    """Whether the project's own model, data and configs are present."""
    names = (shipped.MODEL, shipped.DATA, shipped.CONFIGS)
    if lost := [why for why in map(shipped.missing, names) if why]:
        return Finding(BAD, "; ".join(lost), _how("git checkout .", _REINSTALL))
    return Finding(OK, f"{', '.join(names)} are in {shipped.root()}")


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(BAD, f"Python {shown}; 3.11 or newer is needed", "make PYTHON=python3.12")
    return Finding(OK, f"Python {shown}")


def requirements() -> list[str]:
    """The package's requirements: of the installed package, or of the checkout."""
    try:
        asked = importlib.metadata.requires("cwm_jax") or []
        return [line for line in asked if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        text = (shipped.root() / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["dependencies"]


def packages(asked: Sequence[str]) -> Finding:
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, asked):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is {version}")
    if wrong:
        return Finding(
            BAD,
            "; ".join(wrong),
            _how("make install  (or pip install -e . -c constraints.txt)", _REINSTALL),
        )
    shown = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return Finding(OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown))


def devices() -> Finding:
    """JAX's devices. A GPU that JAX does not find is bad; a machine without one is not."""
    import jax

    from cwm_jax.runtime import devices as runtime_devices

    driver = nvidia_driver()
    if fault := runtime_devices.missing():
        mend = _mend_cuda(driver) if driver else "unset JAX_PLATFORMS, or set it to cpu"
        return Finding(BAD, fault, mend)
    found = jax.devices()
    kinds = ", ".join(f"{d.platform} {d.device_kind}{_memory(d)}" for d in found)
    if found[0].platform == "cpu" and driver:
        what = f"an NVIDIA driver ({driver}) is installed, but JAX computes on the CPU"
        return Finding(BAD, what, _mend_cuda(driver))
    if found[0].platform == "cpu":
        return Finding(NOTE, f"no accelerator: {kinds}; training is slow")
    return Finding(OK, f"{len(found)} × {kinds}" if len(found) == 1 else kinds)


def gpu_memory() -> Finding:
    """Other processes that use memory of a GPU, nearly all of which training allocates."""
    rows = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory")
    held = [[part.strip() for part in row.split(",")] for row in rows]
    names = [f"{row[1]} (process {row[0]}, {row[2]})" for row in held if len(row) == 3]
    if not names:
        return Finding(OK, "no other process holds memory of a GPU")
    mend = "end these, or choose another GPU: CUDA_VISIBLE_DEVICES=1"
    return Finding(NOTE, f"memory of a GPU is held by {', '.join(names)}", mend)


def nvidia_driver() -> str:
    """The driver's version from `nvidia-smi`; empty if there is none."""
    return next(iter(_nvidia_smi("--query-gpu=driver_version")), "")


def _nvidia_smi(query: str) -> list[str]:
    """Output lines of `nvidia-smi`; none if it is missing, fails or hangs."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


# Drivers that JAX's wheels need: https://docs.jax.dev/en/latest/installation.html
_CUDA_12_DRIVER, _CUDA_13_DRIVER = 525, 580


def _mend_cuda(driver: str) -> str:
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdigit() else _CUDA_12_DRIVER
    if major < _CUDA_12_DRIVER:
        return (
            f"install NVIDIA's driver {_CUDA_12_DRIVER} or newer ({_CUDA_13_DRIVER} for CUDA 13); "
            f"{driver} is too old for JAX's CUDA wheels"
        )
    extra = "cuda13" if major >= _CUDA_13_DRIVER else "cuda12"
    return f'pip install -U "cwm_jax[{extra}]"; unset JAX_PLATFORMS'


def _memory(device) -> str:
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return f" ({limit / _GB:.0f} GB for JAX)" if limit else ""


def cudnn(versions: Callable[[str], str] = importlib.metadata.version) -> Finding:
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            return Finding(OK, f"cuDNN {versions(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    import jax

    from cwm_jax.runtime import devices as runtime_devices

    if not runtime_devices.missing() and jax.default_backend() == "gpu":
        return Finding(NOTE, "cuDNN is the system's", 'pip install -U "cwm_jax[cuda12]"')
    return Finding(OK, "cuDNN is not needed without a GPU")


def codecs(available: Iterable[str] | None = None) -> Finding:
    import av

    if missing := {"libx264", "h264"} - set(
        av.codecs_available if available is None else available
    ):
        what = f"PyAV {av.__version__} lacks {', '.join(sorted(missing))}: no videos"
        return Finding(BAD, what, "pip install --force-reinstall --only-binary :all: av")
    return Finding(OK, f"PyAV {av.__version__} writes and reads H.264")


def data_folder(folder: Path) -> Finding:
    """Whether every split has shards, and the first of each is complete; `check` reads them all."""
    from cwm_jax.data import shards

    counts = {}
    for split in shards.SPLITS:
        try:
            found = shards.find_shards(folder, split)
            shards.open_shard(found[0])
            counts[split] = len(found)
        except UserError as error:
            mend = f"python -m cwm_jax.tools.hub download --to {folder}"
            return Finding(BAD, str(error).splitlines()[0], mend)
    return Finding(OK, f"{folder}: shards {counts}")


def wandb_login() -> Finding:
    from cwm_jax.experiment import wandb_run

    try:
        has_key = wandb_run.has_api_key()
    except Exception as error:  # no home folder, or a variable that W&B cannot read
        what = f"W&B cannot read its settings ({_line(error)}): runs stay on this machine"
        return Finding(NOTE, what, "set HOME, and check the variables WANDB_…")
    if has_key:
        return Finding(OK, "a Weights & Biases key is configured")
    return Finding(NOTE, "no Weights & Biases key: runs stay on this machine", "wandb login")


def hub_login() -> Finding:
    with network.hub_settings_read():
        import huggingface_hub

        token = huggingface_hub.get_token()
    if token:
        return Finding(OK, "logged in to the Hugging Face Hub")
    return Finding(NOTE, "not logged in to the hub; only uploading needs it", "hf auth login")


def proxies() -> Finding:
    """Settings of the network; nothing is sent."""
    if wrong := network.faults():
        return Finding(BAD, "; ".join(wrong), "set it right, or unset it")
    names = ", ".join(network.proxies())
    return Finding(OK, f"{names} can be used" if names else "no proxies")


def caches() -> Finding:
    """Whether compiled programs and temporary files can be stored."""
    tempfile.gettempdir()  # raises if no folder is writable
    folder = user_cache.folder()
    if folder is None:
        what = "no home folder: compiled programs and probes are not cached"
        return Finding(NOTE, what, "set HOME or XDG_CACHE_HOME to a folder you may write to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(OK, f"compiled programs and probes are cached in {folder}")
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror}): compiled programs are not cached"
        return Finding(NOTE, what, "set XDG_CACHE_HOME to a folder you may write to")


def disk(folder: Path = Path()) -> Finding:
    free = shutil.disk_usage(folder).free
    what = f"{free / _GB:.0f} GB free in {folder.absolute()}"
    if free < _GB:
        return Finding(BAD, what, "free some, or choose a workdir on another disk")
    return Finding(NOTE if free < 20 * _GB else OK, what)


def cores(count: int | None = os.cpu_count()) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(OK, f"{count} CPU cores, {memory / _GB:.0f} GB of memory")


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    what = f"{free / _GB:.1f} GB of shared memory"
    if free < _SHARED_WANTED:
        mend = "mount -o remount,size=8G /dev/shm, docker run --shm-size=8g, or data.num_workers=0"
        return Finding(NOTE, f"{what}: reading processes may run out", mend)
    return Finding(OK, what)


def open_files(limit: int = resource.getrlimit(resource.RLIMIT_NOFILE)[1]) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < _FILES_WANTED:
        what = f"at most {limit} open files: many shards are read more slowly"
        return Finding(NOTE, what, f"ulimit -Hn {_FILES_WANTED}  (as root)")
    return Finding(OK, "enough open files")


def simulator(folder: Path | None = None) -> Finding:
    from cwm_jax.simulator import venv

    folder = folder or venv.default_folder()
    is_ready = venv.is_ready(folder)
    python = folder / "bin" / "python" if is_ready else Path(sys.executable)
    if missing := venv.missing_libraries(python):
        what = f"the Procgen simulator needs {', '.join(missing)}"
        return Finding(BAD if is_ready else NOTE, what, venv.install_command(missing))
    if is_ready:
        return Finding(OK, f"the Procgen simulator is in {folder}")
    try:
        venv.find_maker()
    except UserError as error:
        return Finding(NOTE, f"no Procgen simulator: {error}")
    mend = _how("make install-procgen", "cwm collect")
    return Finding(NOTE, "no Procgen simulator; recording installs it", mend)


def examine(folder: Path) -> list[tuple[str, Finding]]:
    """Every check by name, in the order of the report."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": python,
        "packages": lambda: packages(requirements()),
        "files": files,
        "gpu memory": gpu_memory,  # before JAX claims it
        "devices": devices,
        "cudnn": cudnn,
        "video": codecs,
        "data": lambda: data_folder(folder),
        "simulator": simulator,
        "wandb": wandb_login,
        "hub": hub_login,
        "network": proxies,
        "disk": disk,
        "caches": caches,
        "cores": cores,
        "shared memory": shared_memory,
        "open files": open_files,
    }
    return [(name, _found(check)) for name, check in checks.items()]


def _found(check: Callable[[], Finding]) -> Finding:
    """The finding of a check; its own failure, such as a missing package, is bad."""
    try:
        return check()
    except UserError as error:
        return Finding(BAD, str(error))
    except ImportError as error:
        mend = _how("make install", _REINSTALL)
        return Finding(BAD, f"cannot be checked: {_line(error)}", mend)
    except Exception as error:
        return Finding(BAD, f"cannot be checked: {_line(error)}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        found = examine(args.data)
        for name, (status, what, mend) in found:
            print(f"{status:>4}  {name:<13}  {what}")
            if mend:
                print(f"{'':21}→ {mend}")
        bad = [name for name, finding in found if finding.status == BAD]
        print(f"not well: {', '.join(bad)}" if bad else "all well")
        if bad:
            raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=path_flag, default=shipped.data(), help="data folder (the embedded)"
    )
    return parser


if __name__ == "__main__":
    main()
