"""A process of a small training run, to inject faults into.

Processes come from a fork server that has imported everything, so they start quickly; they share a
folder of compiled programs.
"""

import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs import base
from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data.records import Episode, encode
from cwm_jax.data.shards import write_shard

STEPS = 15
MEASURED = ("train", "val", "eval", "epoch")  # metrics that an uninterrupted run has too
LIMIT = 240  # seconds; a process that takes longer hangs
_LENGTHS = {"train": ((11, 12), (14,)), "val": ((11, 9),)}  # 10 clips: 5 steps an epoch
_processes = multiprocessing.get_context("forkserver")


def write_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, shards in _LENGTHS.items():
        (folder / split).mkdir(parents=True)
        for i, lengths in enumerate(shards):
            episodes = (
                Episode(
                    rng.integers(0, 256, (length, *FRAME_SHAPE), np.uint8),
                    rng.integers(0, NUM_ACTIONS, length, np.int32),
                )
                for length in lengths
            )
            write_shard(folder / split / f"data_{i:04d}.array_record", map(encode, episodes))
    return folder


_SETTINGS = {
    "model.hidden_size": 24,
    "model.depth": 1,
    "model.num_heads": 3,
    "model.patch_size": 16,
    "model.max_frames": 5,
    "data.clip_len": 5,
    "data.stride": 3,
    "data.batch_size": 2,
    "data.num_workers": 0,
    "data.num_threads": 1,
    "schedule.epochs": STEPS // 5,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 3,
    "optimizer.ema_decay": 0.9,
    "logging.every_steps": 2,
    "logging.wandb.mode": "disabled",
    "validation.every_steps": 4,
    "validation.batches": 1,
    "evaluation.every_steps": 1000,
    "evaluation.clips": 1,
    "evaluation.frames": 4,
    "rollouts.every_steps": 7,
    "rollouts.frames": 6,
    "rollouts.count": 1,
    "checkpoints.every_steps": 3,
    "sampler.ddim_steps": 1,
}


def config_of(data: Path, **changes) -> dict:
    """A config of `STEPS` steps with frequent validation and saves; `changes` by dotted name."""
    config = base.get_config().to_dict()
    for name, value in (_SETTINGS | {"data.dir": str(data)} | changes).items():
        *groups, key = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        place[key] = value
    return config


class TrainingProcess:
    """A process that trains in `workdir`; what it prints is in `log`."""

    def __init__(
        self,
        workdir: Path,
        config: dict,
        *,
        injection: tuple = (),
        environment=(),
        cache: Path | None = None,
        logs: Path | None = None,
    ):
        """Compiled programs are kept in `cache`, the log in `logs`; by default beside `workdir`."""
        self.log = (logs or workdir.parent) / f"{workdir.name}.{time.time_ns()}.log"
        compiled = (cache or workdir.parent) / "compiled"
        arguments = workdir, config, self.log, compiled, injection, dict(environment)
        self._process = _processes.Process(target=_train, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative where a signal ended it; None where it still runs."""
        self._process.join(seconds)
        return self._process.exitcode

    def until(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`, the end of the process, or the time limit."""
        for _ in range(200 * LIMIT):
            if ready() or not self._process.is_alive():
                return
            time.sleep(0.005)

    def end(self) -> int | None:
        """The exit code, as from `wait`; kills a process that hangs, and returns None."""
        for _ in range(LIMIT):  # a second each, so that a campaign may be paused for a while
            if self.wait(1) is not None:
                return self._process.exitcode
        self.kill()
        self._process.join()
        return None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def start_fork_server() -> None:
    """Starts the fork server with all imports of a training process."""
    _processes.set_forkserver_preload(["cwm_jax.experiment.loop", "tests.faults.injection"])


def _train(workdir, config, log, cache, injection, environment) -> None:
    _print_to(log)
    faulthandler.enable()
    os.environ.update(environment)
    import jax
    from absl import logging

    from cwm_jax.errors import echo, shown_to_user
    from cwm_jax.experiment import loop
    from cwm_jax.experiment.settings import Settings
    from cwm_jax.rendering import plots
    from cwm_jax.runtime import preemption
    from tests.faults.injection import Injection

    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    plots.curves = lambda *_: None  # takes half of such a short run's time
    if injection:
        Injection(*injection).prepare()
    try:
        with shown_to_user():
            state = loop.train(Settings.from_config(config), workdir, config=config)
    except preemption.Preempted as stopped:
        echo(str(stopped))
        raise SystemExit(preemption.EXIT_CODE) from None
    (workdir / "end.json").write_text(json.dumps(_digest(state)))


def _print_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def _digest(state) -> str:
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        digest.update(f"{path}{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def final_digest(workdir: Path) -> str | None:
    """The digest of all parameters and optimizer state at the end of the run."""
    path = workdir / "end.json"
    return json.loads(path.read_text()) if path.exists() else None


def measured(workdir: Path) -> list[tuple]:
    """(step, name, value) of the `MEASURED` metrics in metrics.jsonl, in order."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        (record["step"], name, value)
        for record in map(json.loads, lines)
        for name, value in record.items()
        if name.split("/")[0] in MEASURED
    ]


def saved_steps(workdir: Path) -> list[int]:
    """Steps whose checkpoints are complete."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdigit() and (p / "SHA256SUMS").exists())
