"""The training loop: training steps, and periodic logs, validation, rollouts and checkpoints."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from cwm_jax import files
from cwm_jax.checkpoints import formats, run_checkpoint
from cwm_jax.data import device_data, loader
from cwm_jax.errors import UserError, echo
from cwm_jax.evaluation import generation, lpips_weights, quick, single_step
from cwm_jax.experiment import (
    clock,
    dry_run,
    metrics_file,
    progress,
    reporters,
    resume_check,
    run_directory,
    stages,
)
from cwm_jax.experiment.settings import Settings
from cwm_jax.models import dit, kernel_choice
from cwm_jax.rendering import contact_sheet, video
from cwm_jax.runtime import (
    device_speed,
    hosts,
    preemption,
    process_memory,
    random_numbers,
    sharding,
)
from cwm_jax.sampling import rollouts
from cwm_jax.sampling.sampler import Sampler
from cwm_jax.training import train_step
from cwm_jax.training.examples import Teacher
from cwm_jax.training.train_step import TrainState

Result = TypeVar("Result")


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
    with lock, contextlib.closing(run.batches), _memory_named(settings):
        return run.train()


class _Run:
    def __init__(self, settings: Settings, workdir: Path, config: dict):
        self.settings, self.workdir, self.config = settings, workdir, config
        self.clock = clock.Clock(settings.schedule.minutes, settings.schedule.decay_share)
        self.saved_seconds = 0.0  # of the clock, at the last save
        self._check_one_process()
        self.mesh = sharding.make_mesh(settings.compute.fsdp)
        self.batch_size = sharding.global_batch_size(
            settings.data.batch_size,
            settings.data.global_batch_size,
            parts=settings.compute.accumulate_steps,
        )
        self.shared = dict(
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_actions=settings.model.action_values,
        )
        self.batches = loader.train_batches(
            settings.data,
            batch_size=self.batch_size,
            seed=settings.seed,
            make=self._kind_of_batches(),
            outcomes=settings.model.heads,
            **self.shared,
        )
        self.validation = self._val_batches(limit=settings.validation.batches * self.batch_size)
        self.whole_validation = self._val_batches(limit=None)
        # Hosts may have their own copies of the data, and one may be incomplete.
        val = {"clips": self.whole_validation.num_clips}
        hosts.check_same({"data": {"train": self.batches.get_state(), "val": val}})
        self.script = self._script() if settings.rollouts.every_steps else None
        self.quick = self._quick() if settings.evaluation.every_steps else None
        plan = settings.schedule
        total = plan.epochs * self.batches.per_epoch
        self.total_steps = min(total, plan.max_steps or total)
        if settings.optimizer.decay_steps and self.total_steps < plan.max_steps:
            raise UserError(
                f"config.schedule.epochs={plan.epochs} end after {total} updates, before "
                f"config.schedule.max_steps={plan.max_steps}, at which decay_steps "
                f"bring the learning rate to 0: raise epochs or lower max_steps"
            )

    def _check_one_process(self) -> None:
        """Refuses settings for one process only: each process has its own clock and memory."""
        settings = self.settings
        for name, value in (
            ("schedule.minutes", settings.schedule.minutes),
            ("checkpoints.every_minutes", settings.checkpoints.every_minutes),
            ("data.on_device", settings.data.on_device),
        ):
            if value and jax.process_count() > 1:
                raise UserError(
                    f"config.{name}={value:g} is for one process, and there are "
                    f"{jax.process_count()}: set it to 0"
                )

    def _kind_of_batches(self) -> Callable[..., loader.TrainBatches]:
        if self.settings.data.on_device:
            return functools.partial(device_data.DeviceBatches, mesh=self.mesh)
        return loader.TrainBatches

    def _val_batches(self, *, limit: int | None) -> loader.EvalBatches:
        return loader.eval_batches(
            self.settings.data, "val", batch_size=self.batch_size, limit=limit, **self.shared
        )

    def _script(self) -> rollouts.Script:
        """The same clips each time, so that rollouts are comparable."""
        settings = self.settings
        with _setting_named("rollouts.frames", settings.rollouts.frames):
            return rollouts.write_script(
                settings.data,
                "val",
                count=settings.rollouts.count,
                frames=settings.rollouts.frames,
                n_prompt=settings.rollouts.n_prompt,
                num_actions=settings.model.action_values,
                seed=settings.seed,
            )

    def _quick(self) -> quick.Quick:
        settings = self.settings
        with _setting_named("evaluation.frames", settings.evaluation.frames):
            return quick.prepare(
                settings.data,
                "val",
                clips=settings.evaluation.clips,
                frames=settings.evaluation.frames,
                num_actions=settings.model.action_values,
                seed=settings.seed,
                lpips=None if jax.process_index() else lpips_weights.available(),
            )

    def train(self) -> TrainState:
        settings = self.settings
        key = random_numbers.key(settings.seed)
        # With the kernels for this device; checkpoints keep the config unchanged.
        self.network = kernel_choice.measured(
            settings.model,
            clips=self.batch_size // jax.device_count() // settings.compute.accumulate_steps,
            frames=settings.data.clip_len,
        )
        setup = dataclasses.replace(settings.setup(self.mesh), network=self.network)
        updates = stages.Stages(settings.stages, setup, self._teacher(), self._memory_check())
        with (
            contextlib.closing(updates),
            preemption.Stop() as stop,
            self._checkpoints() as self.checkpoints,
        ):
            first, state, pause_due = self._start()
            with self._reporter(first) as self.reporter:
                late = self._progress(first, state)
                if pause_due:
                    state = self._pause(first, state, stop)
                for step in range(first + 1, self.total_steps + 1):
                    if stop.requested(step - 1):
                        break
                    batch = sharding.to_devices(next(self.batches), self.mesh)
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
        given = None if saved else self._given_params()
        if saved and saved.data_position:
            self.batches.set_state(json.loads(saved.data_position))
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

    def _given_params(self) -> dict[str, np.ndarray] | None:
        """The parameters that a new run begins with; None where they are random."""
        path = self.settings.init_from
        if not path:
            return None
        echo(f"starting from the parameters of {path}", file=sys.stdout)
        return self._params_of("init_from", path)

    def _teacher(self) -> Teacher | None:
        path = self.settings.distil_from
        if not path:
            return None
        params = self._params_of("distil_from", path)
        echo(f"distilling {path} to half of its denoising steps", file=sys.stdout)
        make = functools.partial(
            train_step.init_teacher, self.settings.model, steps=self.settings.sampler.ddim_steps
        )
        shapes = jax.eval_shape(make, params)
        return jax.jit(make, out_shardings=sharding.placement(shapes, self.mesh))(params)

    def _params_of(self, setting: str, path: str) -> dict[str, np.ndarray]:
        """The parameters of a model that a setting names; it must have this run's network.

        But for heads: they begin anew where it has none.
        """
        network = self.settings.model
        try:
            given = formats.load(path)
        except UserError as error:
            raise UserError(f"config.{setting}: {error}") from None
        same_heads = dataclasses.replace(given.network, heads=network.heads)
        if differs := formats.same_network(same_heads, network):
            raise UserError(
                f"config.{setting}={path} has another network than config.model: {differs}"
            )
        params = dit.with_heads(network, given.params, self.settings.seed)
        return jax.tree.map(np.asarray, params)

    def _progress(self, first: int, state: TrainState) -> progress.Progress:
        ahead = self.batches.get_state()["batches_taken"] - first  # not 0 if the run was imported
        return progress.Progress(
            self.reporter,
            self.workdir,
            lambda step: self.batches.origins(step - 1 + ahead),
            frames_per_step=self.batch_size * self.settings.data.clip_len,
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

    def _ends_epoch(self, step: int) -> bool:
        return step % self.batches.per_epoch == 0

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
            batches = stop.until(self.validation)
            val_loss = _attempt("validate", lambda: self._validate(step, weights, batches))
        scores = _is_due(step, settings.evaluation.every_steps)
        videos = _is_due(step, settings.rollouts.every_steps)
        videos |= bool(settings.rollouts.every_steps) and step == self.total_steps
        if scores or videos:
            self._roll_out(step, weights, scores=scores, videos=videos)
        if self._ends_epoch(step):
            batches = stop.until(self.whole_validation)
            _attempt("measure the epoch", lambda: self._measure_epoch(step, state, batches))
            state = state._replace(epoch_loss=state.epoch_loss * 0)
        if self._saves(step):
            self._save(state, val_loss=val_loss)
            _attempt("plot curves.png", self._plot_curves, alone=True)
        return state

    def _validate(self, step: int, weights, batches) -> float:
        results = dict(single_step.validation(self.network, weights, batches, self.mesh))
        self.reporter.scalars(step, results)
        return results["val/loss"]

    def _measure_epoch(self, step: int, state: TrainState, batches) -> None:
        weights = train_step.weights_to_sample(state)
        results = single_step.epoch_end(self.network, weights, batches, self.mesh)
        loss_sum, count = sharding.local(sharding.whole(state.epoch_loss, self.mesh))
        self.reporter.scalars(step, {"epoch/train_loss": loss_sum / count, **dict(results)})

    def _roll_out(self, step: int, weights, *, scores: bool, videos: bool) -> None:
        """Runs rollouts in the first process; every process must call it."""
        weights = sharding.whole(weights, self.mesh)
        if jax.process_index():
            return
        sampler = _attempt("prepare rollouts", lambda: self._sampler(weights), alone=True)
        if scores and sampler:
            _attempt("score rollouts", lambda: self._evaluate(step, sampler), alone=True)
        if videos and sampler:
            _attempt(
                "write a rollout video", lambda: self._write_rollout(step, sampler), alone=True
            )

    def _save(self, state: TrainState, **details) -> None:
        position = json.dumps(self.batches.get_state())
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

    def _plot_curves(self) -> None:
        from cwm_jax.rendering import plots  # imports Matplotlib, which training does not need

        if jax.process_index() == 0:
            series = metrics_file.read_series(self.workdir / reporters.METRICS_FILE)
            if any(name.endswith("loss") for name in series):  # there are none before the first log
                plots.curves(series, self.workdir / "curves.png")

    def _sampler(self, weights) -> Sampler:
        return Sampler(self.settings.model, sharding.local(weights), self.settings.rollout_sampler)

    def _evaluate(self, step: int, sampler: Sampler) -> None:
        """Runs the quick evaluation."""
        self.reporter.scalars(step, dict(quick.run(generation.by_sampler(sampler), self.quick)))

    def _write_rollout(self, step: int, sampler: Sampler) -> None:
        """Writes rollouts from validation clips, as a video and a contact sheet."""
        settings, name = self.settings, f"rollout_{step:07d}"
        mp4 = self.workdir / "rollouts" / f"{name}.mp4"
        key = random_numbers.key(settings.seed)
        frames = rollouts.write(sampler, self.script, mp4, key=key)
        png = mp4.with_suffix(".png")
        video.write_png(
            png, contact_sheet.grid(self.script.real, frames, n_prompt=settings.rollouts.n_prompt)
        )
        self.reporter.video(step, "rollout/video", mp4)
        self.reporter.image(step, "rollout/grid", png)


def _is_due(step: int, every: int) -> bool:
    """Whether something is due that happens every so many steps; 0: never."""
    return bool(every) and step % every == 0


@contextlib.contextmanager
def _setting_named(name: str, value: int) -> Iterator[None]:
    """Adds the setting to an error about validation clips."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (config.{name}={value})") from None


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


def _attempt(what: str, action: Callable[[], Result], *, alone: bool = False) -> Result | None:
    """Runs an optional action, such as writing a video; its errors are logged, and None returned.

    Args:
        alone: the action involves no other process. With others, errors are raised, since the
            other processes would wait for the one that failed.
    """
    try:
        return action()
    except preemption.StopRequested:
        raise
    except Exception as error:
        if jax.process_count() > 1 and not alone:
            raise
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        echo(f"WARNING: cannot {what}: {name}{error}; training continues")
        return None
