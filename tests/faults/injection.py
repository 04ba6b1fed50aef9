"""Injects a fault into the process of a run, just before a chosen step."""

import multiprocessing
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp

from cwm_jax.experiment import wandb_run
from cwm_jax.training import train_step


class Injection:
    """Does `what` to `target` before update number `step` of the run (from 1)."""

    def __init__(self, what: str, step: int, target=None):
        self._what, self._step, self._target = getattr(self, f"_{what}"), step, target

    def prepare(self) -> None:
        wandb_run._INIT_SECONDS = 2  # a shorter wait for an unreachable server
        uninterrupted = train_step.train_step

        def with_fault(state, batch, key, *setup, **options):
            if int(state.step) + 1 == self._step:
                batch = self._what(batch) or batch
            return uninterrupted(state, batch, key, *setup, **options)

        train_step.train_step = with_fault

    def _nothing(self, batch) -> None:
        pass

    def _nan(self, batch) -> dict:
        return batch | {"frames": jnp.full(batch["frames"].shape, jnp.nan)}

    def _flip(self, batch) -> None:
        path, place = self._target
        raw = bytearray(Path(path).read_bytes())
        raw[place] ^= 0x10
        Path(path).write_bytes(raw)

    def _truncate(self, batch) -> None:
        path, size = self._target
        os.truncate(path, size)

    def _vanish(self, batch) -> None:
        Path(self._target).unlink()

    def _kill_worker(self, batch) -> None:
        for worker in multiprocessing.active_children()[:1]:
            os.kill(worker.pid, signal.SIGKILL)

    def _signal(self, batch) -> None:
        os.kill(os.getpid(), self._target)

    def _fill_disk(self, batch) -> None:
        """Fills the disk; frees it again before a later step if the target names one."""
        folder, until = self._target
        filler = Path(folder) / "filler"
        jax.effects_barrier()
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        except OSError:
            pass
        if until:
            self._step, self._what = until, lambda batch: filler.unlink()
