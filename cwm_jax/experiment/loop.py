"""The training loop: training steps, and periodic logs, validation, rollouts and checkpoints."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from cwm_jax import files
from cwm_jax.checkpoints import run_checkpoint
from cwm_jax.errors import UserError, echo
from cwm_jax.experiment import (
    clock,
    dry_run,
    given_models,
    progress,
    reporters,
    resume_check,
    run_data,
    run_directory,
    stages,
)
from cwm_jax.experiment.measurements import Measurements
from cwm_jax.experiment.settings import Settings
from cwm_jax.models import kernel_choice
from cwm_jax.runtime import device_speed, preemption, process_memory, random_numbers, sharding
from cwm_jax.training import train_step
from cwm_jax.training.train_step import TrainState


def train(settings: Settings, workdir: Path, *, config: dict) -> TrainState:
    """Trains for `epochs`, `max_steps` or `minutes`; resumes from the workdir's last checkpoint.

    Args:
        workdir: gets `checkpoints/`, `rollouts/`, `metrics.jsonl`, `config.json`, and
            `post-mortem/` where a loss was not finite.
        config: the full config as a plain dict, kept with every checkpoint.

    Raises:
        UserError: settings, data or workdir cannot be used, or training failed.
        preemption.Preempted: a signal stopped it; everything so far is saved.
    """
    run = _Run(settings, workdir, config)
    run_directory.make(workdir)
    is_first = jax.process_index() == 0
    lock = run_directory.held(workdir) if is_first else contextlib.nullcontext()
    with lock, contextlib.closing(run.data), _memory_named(settings):
        return run.train()


class _Run:
    def __init__(self, settings: Settings, workdir: Path, config: dict):
        self.settings, self.workdir, self.config = settings, workdir, config
        self.clock = clock.Clock(settings.schedule.minutes, settings.schedule.decay_share)
        self.saved_seconds = 0.0  # of the clock, at the last save
        run_data.check_one_process(settings)
        self.mesh = sharding.make_mesh(settings.compute.fsdp)
        self.data = run_data.RunData(settings, self.mesh)
        self.total_steps = self.data.total_steps()

    def train(self) -> TrainState:
        settings = self.settings
        key = random_numbers.key(settings.seed)
        # With the kernels for this device; checkpoints keep the config unchanged.
        self.network = kernel_choice.measured(
            settings.model,
            clips=self.data.batch_size // jax.device_count() // settings.compute.accumulate_steps,
            frames=settings.data.clip_len,
        )
        setup = dataclasses.replace(settings.setup(self.mesh), network=self.network)
        teacher = given_models.teacher(settings, self.mesh)
        updates = stages.Stages(settings.stages, setup, teacher, self._memory_check())
        with (
            contextlib.closing(updates),
            preemption.Stop() as stop,
            self._checkpoints() as self.checkpoints,
        ):
            first, state, pause_due = self._start()
            with self._reporter(first) as self.reporter:
                self.measurements = self._measurements()
                late = self._progress(first, state)
                if pause_due:
                    state = self._pause(first, state, stop)
                for step in range(first + 1, self.total_steps + 1):
                    if stop.requested(step - 1):
                        break
                    batch = sharding.to_devices(next(self.data.train), self.mesh)
                    state, metrics = updates.update(
                        self._share(step), state, batch, key, **self._rate()
                    )
                    metrics |= self._keep_time(step)
                    reported = step % settings.logging.every_steps == 0 or step == self.total_steps
                    late.after(step, metrics, reported=reported)
                    self.checkpoints.settle(wait=False)
                    if self._is_pause(step):
                        late.catch_up()
                        state = self._pause(step, state, stop)
                        late.restart(step)
                    if step == self.total_steps:
                        break
                late.catch_up()
                self._finish(state, stop)
        return state

    def _memory_check(self) -> Callable | None:
        """Of the compiled step; None where the device does not report its memory, as a CPU."""
        if device_speed.memory_limit() is None:
            return None
        return functools.partial(
            dry_run.check_memory, dataclasses.replace(self.settings, model=self.network)
        )

    def _share(self, step: int) -> float:
        """The share of the run before this step."""
        return self.clock.share if self.settings.schedule.minutes else (step - 1) / self.total_steps

    def _rate(self) -> dict[str, np.float32]:
        """The factor of the learning rate of a run with `minutes`."""
        return {"rate": np.float32(self.clock.rate)} if self.settings.schedule.minutes else {}

    def _keep_time(self, step: int) -> dict[str, float]:
        """Makes a step the last one if the minutes are over; returns the minutes to log."""
        minutes = self.settings.schedule.minutes
        if not minutes:
            return {}
        seconds = self.clock.seconds
        if self.clock.is_over:
            if step == 1:
                raise UserError(
                    f"config.schedule.minutes={minutes:g} ended with the first update, "
                    f"{seconds:.0f} s after the start, compilation included; nothing was saved. "
                    f"Set it higher."
                )
            self.total_steps = step
        return {"train/minutes": seconds / 60}

    def _checkpoints(self) -> run_checkpoint.Checkpoints:
        settings = self.settings
        retention = run_checkpoint.Retention(
            settings.checkpoints.keep,
            settings.checkpoints.keep_every_steps,
            settings.checkpoints.keep_best,
        )
        return run_checkpoint.Checkpoints(self.workdir, retention=retention)

    def _start(self) -> tuple[int, TrainState, bool]:
        """The steps done, a new state or the last saved one, and whether a pause is due.

        Also restores the position in the data.
        """
        settings = self.settings
        begin = functools.partial(
            train_step.init_state, settings.model, settings.optimizer, settings.seed
        )
        shapes = jax.eval_shape(begin)
        saved = self.checkpoints.newest()
        differing = resume_check.compare(saved.config, self.config) if saved else []
        given = None if saved else given_models.first_params(settings)
        if saved and saved.data_position:
            self.data.train.set_state(json.loads(saved.data_position))
        if saved:
            self.clock.resume(saved.seconds)
            self.saved_seconds = saved.seconds
            if self.clock.is_over:
                self.total_steps = saved.step
        if jax.process_index() == 0:
            with files.written_whole(self.workdir / "config.json") as temporary:
                temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        if saved is None:
            make = jax.jit(begin, out_shardings=sharding.placement(shapes, self.mesh))
            return 0, make(given), False
        state = self.checkpoints.restore(sharding.abstract(shapes, self.mesh))
        lines = [f"resuming from step {self._place(saved.step)} in {self.workdir}"]
        lines += [f"  changed setting: {line}" for line in differing]
        echo("\n".join(lines), file=sys.stdout)
        return saved.step, state, saved.pause_due

    def _place(self, step: int) -> str:
        """A step of the run, for messages."""
        minutes = self.settings.schedule.minutes
        if not minutes:
            return f"{step} of {self.total_steps}"
        return f"{step} ({min(self.clock.seconds / 60, minutes):.1f} of {minutes:g} minutes)"

    def _progress(self, first: int, state: TrainState) -> progress.Progress:
        ahead = (
            self.data.train.get_state()["batches_taken"] - first
        )  # not 0 if the run was imported
        return progress.Progress(
            self.reporter,
            self.workdir,
            lambda step: self.data.train.origins(step - 1 + ahead),
            frames_per_step=self.data.batch_size * self.settings.data.clip_len,
            skipped=int(state.skipped),
            max_skipped=self.settings.optimizer.max_skipped_updates,
            kernels=kernel_choice.settings(self.network),
        )

    def _reporter(self, first: int) -> reporters.Reporter:
        return reporters.open_reporter(
            self.workdir,
            total_steps=None if self.settings.schedule.minutes else self.total_steps,
            wandb=self.settings.logging.wandb,
            tensorboard=self.settings.logging.tensorboard,
            run_config=self.config,
            resume_step=first or None,
            enabled=jax.process_index() == 0,
        )

    def _measurements(self) -> Measurements:
        given = self.settings, self.network, self.data, self.mesh, self.workdir, self.reporter
        return Measurements(*given)

    def _ends_epoch(self, step: int) -> bool:
        return step % self.data.train.per_epoch == 0

    def _is_pause(self, step: int) -> bool:
        """Whether something other than training happens after this step."""
        settings = self.settings
        cadences = (
            settings.validation.every_steps,
            settings.evaluation.every_steps,
            settings.rollouts.every_steps,
        )
        return any(_is_due(step, every) for every in cadences) or self._saves(step)

    def _saves(self, step: int) -> bool:
        minutes = self.settings.checkpoints.every_minutes
        return (
            _is_due(step, self.settings.checkpoints.every_steps)
            or bool(minutes and self.clock.seconds - self.saved_seconds >= 60 * minutes)
            or self._ends_epoch(step)
            or step == self.total_steps
        )

    def _pause(self, step: int, state: TrainState, stop: preemption.Stop) -> TrainState:
        """Work after a step; postponed to the next start of the run if a stop is requested."""
        try:
            state = self._evaluate_and_save(step, state, stop)
            process_memory.release_freed()
            return state
        except preemption.StopRequested:
            self._save(state, pause_due=True)
            self._leave(step, stop)

    def _evaluate_and_save(self, step: int, state: TrainState, stop: preemption.Stop) -> TrainState:
        settings = self.settings
        weights = train_step.weights_to_sample(state)
        val_loss = None
        if _is_due(step, settings.validation.every_steps):
            batches = stop.until(self.data.validation)
            val_loss = self.measurements.validation(step, weights, batches)
        scores = _is_due(step, settings.evaluation.every_steps)
        videos = _is_due(step, settings.rollouts.every_steps)
        videos |= bool(settings.rollouts.every_steps) and step == self.total_steps
        if scores or videos:
            self.measurements.rollouts(step, weights, scores=scores, videos=videos)
        if self._ends_epoch(step):
            self.measurements.epoch(step, state, stop.until(self.data.whole_validation))
            state = state._replace(epoch_loss=state.epoch_loss * 0)
        if self._saves(step):
            self._save(state, val_loss=val_loss)
            self.measurements.plot_curves()
        return state

    def _save(self, state: TrainState, **details) -> None:
        position = json.dumps(self.data.train.get_state())
        self.saved_seconds = self.clock.seconds
        details |= dict(data_position=position, config=self.config, seconds=self.saved_seconds)
        seconds = self.checkpoints.save(state, **details)
        self.reporter.scalars(int(state.step), {"perf/save_seconds": seconds})

    def _finish(self, state: TrainState, stop: preemption.Stop) -> None:
        """Ensures that the last checkpoint is saved; raises `Preempted` after a stop request."""
        step = int(state.step)
        if step < self.total_steps:
            self._save(state)
            self._leave(step, stop)
        if not self.checkpoints.settle():
            raise UserError(
                f"training is done, but its last checkpoint could not be saved in {self.workdir}: "
                f"free disk space and start it again; it resumes from the previous checkpoint"
            )

    def _leave(self, step: int, stop: preemption.Stop) -> None:
        saved = self.checkpoints.settle()
        raise preemption.Preempted(
            f"stopped by {stop.signal} after step {self._place(step)}, "
            + (f"saved in {self.workdir}" if saved else "WHICH COULD NOT BE SAVED")
            + ". Run the same command again to resume."
        )


def _is_due(step: int, every: int) -> bool:
    """Whether something is due that happens every so many steps; 0: never."""
    return bool(every) and step % every == 0


@contextlib.contextmanager
def _memory_named(settings: Settings) -> Iterator[None]:
    """Names what to change in an error about exhausted device memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        frames = settings.data.on_device
        cause = (
            f"config.data.on_device={frames} leaves too little of the device's memory for "
            f"training: set it lower"
            if frames
            else "the device's memory is exhausted: --dry-run reports what fits"
        )
        raise UserError(f"{cause} ({str(error).splitlines()[0][:200]})") from None
