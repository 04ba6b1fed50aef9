"""Makes the pocket model: records the game, trains `configs/pocket.py` for a set time, exports it.

    python -m cwm_jax.tools.pocket --minutes 9 --frames 4000000
    python -m cwm_jax.tools.pocket --minutes 300 --data data/mine --output mine.safetensors

`make pocket MINUTES=9 FRAMES=4000000` does the same. The same command continues an interrupted
one. On a GPU the frames are stored in its memory. A data folder that was not
recorded here is used as it is. Other arguments, --config.NAME=VALUE, go to train.py.

During training the newest save is exported, at first after two minutes and then each time that the
training has doubled, so a run that was killed leaves a model. After training, some held-out clips
are measured, and `card.md` is written beside the export.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.checkpoints.run_checkpoint import FOLDER
from cwm_jax.data.records import FRAME_BYTES
from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.experiment import card_measurement
from cwm_jax.files import path_flag
from cwm_jax.runtime import device_query, process_memory, subprograms
from cwm_jax.runtime.device_query import Device
from cwm_jax.runtime.preemption import EXIT_CODE
from cwm_jax.simulator import missing_records

SAVE_MINUTES = 2.0  # `checkpoints.every_minutes` of `configs/pocket.py`
_STEP_BYTES = 14 * 10**9  # of GPU memory, besides the frames: 128 clips of 12 frames
_GPU_BATCH = 128


def check_memory(frames: int, device: Device) -> None:
    """Raises `UserError` if the frames do not fit into the GPU's memory during training."""
    fitting = (device.memory - _STEP_BYTES) // FRAME_BYTES
    if device.is_gpu and device.memory and frames > fitting:
        gib = device.memory / 2**30
        raise UserError(
            f"FRAMES={frames} (--frames) take {frames * FRAME_BYTES / 2**30:.1f} GiB, and "
            f"{device.kind} has {gib:.1f} GiB, of which training needs {_STEP_BYTES / 2**30:.1f}: "
            f"use at most FRAMES={max(0, fitting)}"
        )


def train_words(args: argparse.Namespace, device: Device, more: Sequence[str]) -> list[str]:
    """The arguments of Python that start training."""
    settings = {"schedule.minutes": args.minutes, "data.dir": args.data}
    if device.is_gpu:
        settings |= {"data.batch_size": _GPU_BATCH, "data.global_batch_size": _GPU_BATCH}
        settings |= {"data.on_device": args.frames}
        # Each would compile another program, which takes a minute of the training time.
        settings |= {"validation.every_steps": 0, "evaluation.every_steps": 0}
        settings |= {"rollouts.every_steps": 0}
    if device.has_kernels:
        settings |= {"model.attention": "fused", "model.norm": "triton"}
    words = ["-m", "cwm_jax.programs.train", "--config", str(shipped.config("pocket"))]
    words += ["--workdir", str(args.workdir)]
    return words + [f"--config.{name}={value}" for name, value in settings.items()] + [*more]


def saved(workdir: Path) -> list[int]:
    """The steps of the saved checkpoints, rising."""
    return sorted(int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit())


def export_words(args: argparse.Namespace) -> list[str]:
    """The arguments of Python that export the newest checkpoint."""
    words = ["-m", "cwm_jax.tools.export", str(args.workdir), "--format", "safetensors"]
    return [*words, "--dtype", "bfloat16", "--output", str(args.output)]


class EarlyExports:
    """Exports the newest checkpoint during training, each time that its step has doubled."""

    def __init__(self, args: argparse.Namespace):
        begun = saved(args.workdir) if args.output.exists() else []
        self._args, self._step = args, max(begun, default=0)
        self._program: subprocess.Popen | None = None

    def __call__(self) -> None:
        """To be called now and then; does not wait."""
        if self._program is not None and self._program.poll() is None:
            return
        self._report()
        newest = max(saved(self._args.workdir), default=0)
        if newest and newest >= 2 * self._step:
            self._step = newest
            self._program = subprocess.Popen(
                [sys.executable, *export_words(self._args)],
                env=subprograms.environment(JAX_PLATFORMS="cpu"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """Waits for an export that has begun."""
        if self._program is not None:
            self._program.wait()
            self._report()

    def _report(self) -> None:
        if self._program is None:
            return
        failed, self._program = self._program.returncode, None
        words = f"cannot export step {self._step} yet" if failed else f"exported step {self._step}"
        echo(f"{words}{'' if failed else f' to {self._args.output}'}; training goes on")


def _leave_unless_done(code: int) -> None:
    if code:
        raise SystemExit(subprograms.status(code))


def export(args: argparse.Namespace) -> None:
    """Exports the newest checkpoint; exits with the program's code if that is not 0."""
    _leave_unless_done(subprograms.run(export_words(args), JAX_PLATFORMS="cpu"))


def make(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Records, trains, exports and measures; exits with train.py's code if that is not 0.

    Raises:
        UserError: unusable arguments, machine or folder.
    """
    device = device_query.find()
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
    missing_records.record(args.data, args.frames)
    echo(f"training for {args.minutes:g} minutes on {device.kind}")
    if warning := too_short(args.minutes, more):
        echo(warning)
    early = EarlyExports(args)
    code = subprograms.run(train_words(args, device, more), meanwhile=early)
    early.close()
    if (code in (0, EXIT_CODE) or code < 0) and saved(args.workdir):
        export(args)
        if code == 0 and args.card_minutes:
            cores = "" if device.is_gpu else f", {os.cpu_count()} cores"
            clips = card_measurement.ON_GPU if device.is_gpu else card_measurement.ON_CPU
            where = args.output, args.workdir, device.kind + cores
            card_measurement.write(*where, minutes=args.card_minutes, clips=clips)
    _leave_unless_done(code)


def too_short(minutes: float, more: Sequence[str]) -> str:
    """A warning where training ends before its first save by the clock; else empty."""
    flag = "--config.checkpoints.every_minutes="
    given = [word.removeprefix(flag) for word in more if word.startswith(flag)]
    try:
        every = float(given[-1]) if given else SAVE_MINUTES
    except ValueError:  # train.py reports it
        return ""
    if 0 < every < minutes:
        return ""
    return (
        f"WARNING: MINUTES={minutes:g} are over before the first save, by {flag[2:]}{every:g}: the "
        f"model is saved at the end alone, and lost if the run is killed before"
    )


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser()
    with shown_to_user():
        args, more = flags.parse_known_args(argv)
        if other := [word for word in more if not word.startswith("--config.")]:
            flags.error(f"unrecognized arguments: {' '.join(other)}")
        args.output = args.output or args.workdir / "model.safetensors"
        if not args.export_only:
            make(args, more)
        elif saved(args.workdir):
            export(args)
        else:
            raise UserError(f"--export-only: {args.workdir} has no checkpoint yet")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, help="of training, including compilation (GPU: 9; CPU: 300)")
    add("--frames", type=int, help="to record and train on (GPU: 4,000,000; CPU: 500,000)")
    add("--data", type=path_flag, default=Path("data/pocket"), help="data folder (%(default)s)")
    add("--workdir", type=path_flag, default=Path("runs/pocket"), help="of training (%(default)s)")
    add("--output", type=path_flag, help="file to export to (model.safetensors in the workdir)")
    add(
        "--card-minutes",
        type=float,
        default=10.0,
        help="for measuring the model after training; 0: no card (%(default)s)",
    )
    add("--export-only", action="store_true", help="export the newest checkpoint, do nothing else")
    return parser


if __name__ == "__main__":
    main()
