"""Makes the pocket world: records the game, trains `configs/pocket.py` by the clock, exports it.

    python -m cwm_jax.tools.pocket --minutes 9 --frames 4000000
    python -m cwm_jax.tools.pocket --minutes 300 --data data/mine --output mine.safetensors

`make pocket MINUTES=9 FRAMES=4000000` does the same. The same command goes on where an earlier
one was interrupted. On a GPU the frames are kept in its memory. A data folder that was not
recorded here is used as it is. Other arguments, --config.NAME=VALUE, go to train.py.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cwm_jax import controls, files, shipped
from cwm_jax.checkpoints.run_checkpoint import FOLDER
from cwm_jax.data import shards
from cwm_jax.data.records import FRAME_BYTES
from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.runtime import process_memory
from cwm_jax.runtime.preemption import EXIT_CODE

POLICY, SEED = "random=1,sticky=3", 1
HELD_OUT = 200  # records of val, and of test

# Of 1,500 records by POLICY: a record is 160 frames, and less where an episode ends.
_FRAMES_PER_RECORD = 117
_BYTES_PER_FRAME = 740  # compressed, on disk
_STEP_BYTES = 14 * 10**9  # of GPU memory, beside the frames: 128 clips of 12 frames
_GPU_BATCH = 128
_PROBE = """
import jax, json
from cwm_jax.runtime import devices
if fault := devices.missing():
    raise SystemExit(fault)
d = jax.local_devices()[0]
limit = (d.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([d.platform, d.device_kind, limit, getattr(d, "compute_capability", "")]))
"""


class Device(NamedTuple):
    """What training runs on."""

    platform: str  # of JAX: cpu, gpu, …
    kind: str
    memory: int  # bytes, 0 where the device does not report them
    capability: str  # compute capability of an NVIDIA GPU

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels of attention and norm were measured on such a GPU."""
        return self.is_gpu and self.capability == "9.0"


def find_device() -> Device:
    """The device that JAX chooses. Another process asks: asking claims the memory of a GPU.

    Raises:
        UserError: JAX finds no device that it can use.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return Device("cpu", "cpu", 0, "")
    found = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=_environment(),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"JAX finds no device: {reason}\nJAX_PLATFORMS=cpu trains on the CPU.")
    return Device(*json.loads(found.stdout.splitlines()[-1]))


def records_for(frames: int) -> int:
    """Records that hold about so many frames, in whole shards."""
    return 100 * math.ceil(frames / _FRAMES_PER_RECORD / 100)


def check_memory(frames: int, device: Device) -> None:
    """Raises `UserError` where the frames do not fit into the GPU's memory beside training."""
    fitting = (device.memory - _STEP_BYTES) // FRAME_BYTES
    if device.is_gpu and device.memory and frames > fitting:
        gib = device.memory / 2**30
        raise UserError(
            f"FRAMES={frames} (--frames) take {frames * FRAME_BYTES / 2**30:.1f} GiB, and "
            f"{device.kind} has {gib:.1f} GiB, of which training takes {_STEP_BYTES / 2**30:.1f}: "
            f"use at most FRAMES={max(0, fitting)}"
        )


class Recorded(NamedTuple):
    """What a data folder holds."""

    by_us: bool  # there is a `metadata.json` of `cwm_jax.tools.collect`, or no data at all
    records: dict[str, int]  # whole records of each split, where they are known
    frames: int  # of train, where they are known
    wanted: dict[str, int]  # records of each split that the last call was to record


def look_at(data: Path) -> Recorded:
    """Reads what was recorded in a data folder; nothing where it does not exist."""
    none = dict.fromkeys(shards.SPLITS, 0)
    path = data / controls.METADATA
    if path.is_file():
        try:
            said = files.read_json_object(path)
            if "recipe" in said:
                of = said["splits"]
                records = {split: of[split]["records"] for split in shards.SPLITS}
                wanted = {split: of[split]["wanted"] for split in shards.SPLITS}
                return Recorded(True, records, of["train"]["frames"], wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error!r}") from None
    has_data = any((data / split).is_dir() for split in shards.SPLITS)
    return Recorded(not has_data, none, 0, none)


def record(data: Path, frames: int) -> None:
    """Records what the folder lacks of so many frames, with all cores.

    Raises:
        UserError: there is too little disk, or the game cannot be played here.
    """
    have = look_at(data)
    if not have.by_us:
        echo(f"training on {data} as it is: it was not recorded by cwm_jax.tools.collect")
        return
    wanted = dict(train=records_for(frames), val=HELD_OUT, test=HELD_OUT)
    wanted = {split: max(count, have.wanted[split]) for split, count in wanted.items()}
    missing = sum(max(0, wanted[split] - have.records[split]) for split in wanted)
    if not missing:
        return
    needed, free = missing * _FRAMES_PER_RECORD * _BYTES_PER_FRAME, _free_disk(data)
    if needed > free:
        raise UserError(
            f"FRAMES={frames} (--frames): {missing} records more take about "
            f"{needed / 1e9:.1f} GB in {data}, and {free / 1e9:.1f} GB are free: make room, or "
            f"use fewer frames"
        )
    words = ["-m", "cwm_jax.tools.collect", "--output", str(data), "--policy", POLICY]
    words += ["--seed", str(SEED)]
    for split, count in wanted.items():
        words += [f"--{split}", str(count)]
    code = _run(words)
    if code == 2:
        raise UserError(
            f"{data} holds {have.records['train']} of {wanted['train']} records, and more could "
            f"not be recorded. Install Procgen (make install-procgen; Linux on x86-64, Python 3.11 "
            f"or 3.12), or name a folder with train/ and val/: make pocket DATA=FOLDER"
        )
    _leave_unless_done(code)


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def train_words(args: argparse.Namespace, device: Device, more: Sequence[str]) -> list[str]:
    """The arguments of Python that start training."""
    settings = {"schedule.minutes": args.minutes, "data.dir": args.data}
    if device.is_gpu:
        settings |= {"data.batch_size": _GPU_BATCH, "data.global_batch_size": _GPU_BATCH}
        settings |= {"data.on_device": args.frames}
        # Each would compile a program of its own, which takes a minute of the few there are.
        settings |= {"validation.every_steps": 0, "evaluation.every_steps": 0}
        settings |= {"rollouts.every_steps": 0}
    if device.has_kernels:
        settings |= {"model.attention": "fused", "model.norm": "triton"}
    words = ["-m", "cwm_jax.programs.train", "--config", str(shipped.config("pocket"))]
    words += ["--workdir", str(args.workdir)]
    return words + [f"--config.{name}={value}" for name, value in settings.items()] + [*more]


def _environment(**changes: str) -> dict[str, str]:
    """For programs of ours: they find this package, and see one GPU."""
    path = os.pathsep.join(filter(None, (str(shipped.root()), os.environ.get("PYTHONPATH"))))
    ours = {
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_CLIENT_MEM_FRACTION": str(process_memory.SHARE_OF_GPU),
    }
    return {**ours, **os.environ, "PYTHONPATH": path, **changes}


def _run(words: Sequence[str], **environment: str) -> int:
    """Runs Python; hands on SIGTERM. Of Ctrl-C and its own end a terminal informs both."""
    program = subprocess.Popen([sys.executable, *words], env=_environment(**environment))
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: program.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(
            signal.SIGHUP, lambda *_: program.send_signal(signal.SIGHUP)
        )
    try:
        return program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_unless_done(code: int) -> None:
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def _saved(workdir: Path) -> Iterator[Path]:
    return (p for p in (workdir / FOLDER).glob("*") if p.name.isdigit())


def make(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Records, trains and exports; exits with train.py's code where that is not 0.

    Raises:
        UserError: for arguments, a machine or a folder that cannot be used.
    """
    device = find_device()
    if args.minutes is None:
        args.minutes = 9 if device.is_gpu else 300
    if args.frames is None:
        args.frames = 4_000_000 if device.is_gpu else 500_000
    if args.minutes <= 0 or args.frames < 1:
        name = "MINUTES" if args.minutes <= 0 else "FRAMES"
        raise UserError(f"{name}={getattr(args, name.lower())}: must be more than 0")
    check_memory(args.frames, device)
    if device.is_gpu:
        process_memory.multiply_by_library()
    record(args.data, args.frames)
    echo(f"training for {args.minutes:g} minutes on {device.kind}")
    code = _run(train_words(args, device, more))
    if code in (0, EXIT_CODE) and any(_saved(args.workdir)):
        words = ["-m", "cwm_jax.tools.export", str(args.workdir), "--format", "safetensors"]
        words += ["--dtype", "bfloat16", "--output", str(args.output)]
        _leave_unless_done(_run(words, JAX_PLATFORMS="cpu"))
    _leave_unless_done(code)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser()
    with shown_to_user():
        args, more = flags.parse_known_args(argv)
        if other := [word for word in more if not word.startswith("--config.")]:
            flags.error(f"unrecognized arguments: {' '.join(other)}")
        args.output = args.output or args.workdir / "model.safetensors"
        make(args, more)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, help="of training, compilation included (GPU: 9; CPU: 300)")
    add("--frames", type=int, help="to record and train on (GPU: 4,000,000; CPU: 500,000)")
    add("--data", type=path_flag, default=Path("data/pocket"), help="data folder (%(default)s)")
    add("--workdir", type=path_flag, default=Path("runs/pocket"), help="of training (%(default)s)")
    add("--output", type=path_flag, help="file to export to (model.safetensors in the workdir)")
    return parser


if __name__ == "__main__":
    main()
