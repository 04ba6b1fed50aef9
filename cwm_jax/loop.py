"""The training loop: batches to steps, and at their times logs, validation, rollouts, saves."""

import json
import time
from pathlib import Path

import jax

from cwm_jax import (
    checkpoint,
    curves,
    data,
    evaluate,
    metrics_file,
    parallel,
    report,
    rollouts,
    sheet,
    training,
    video,
)
from cwm_jax.errors import UserError
from cwm_jax.sampler import Sampler
from cwm_jax.settings import Settings
from cwm_jax.training import TrainState


def train(settings: Settings, workdir: Path, *, config: dict) -> TrainState:
    """Trains until `epochs` or `max_steps` are done, going on from the workdir's last checkpoint.

    Args:
        workdir: gets `checkpoints/`, `rollouts/`, `metrics.jsonl`, `config.json`.
        config: the full config as a plain dict, kept with every checkpoint.

    Raises:
        UserError: for settings, data or a workdir that cannot be used.
    """
    return _Run(settings, workdir, config).train()


class _Run:
    def __init__(self, settings: Settings, workdir: Path, config: dict):
        self.settings, self.workdir, self.config = settings, workdir, config
        self.mesh = parallel.make_mesh(settings.fsdp)
        self.batch_size = parallel.global_batch_size(
            settings.batch_size, settings.global_batch_size, parts=settings.accumulate_steps
        )
        self.shared = dict(
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_actions=settings.model.num_actions,
        )
        self.batches = data.train_batches(
            settings.data, batch_size=self.batch_size, seed=settings.seed, **self.shared
        )
        self.validation = self._val_batches(limit=settings.val_batches * self.batch_size)
        self.whole_validation = self._val_batches(limit=None)
        self.script = self._script()
        total = settings.epochs * self.batches.per_epoch
        self.total_steps = min(total, settings.max_steps or total)

    def _val_batches(self, *, limit: int | None) -> data.EvalBatches:
        return data.eval_batches(
            self.settings.data, "val", batch_size=self.batch_size, limit=limit, **self.shared
        )

    def _script(self) -> rollouts.Script:
        """The same clips each time, so that rollouts show the progress."""
        settings = self.settings
        return rollouts.write_script(
            settings.data,
            "val",
            count=settings.n_rollout_samples,
            frames=settings.rollout_frames,
            n_prompt=settings.n_prompt,
            num_actions=settings.model.num_actions,
            seed=settings.seed,
        )

    def train(self) -> TrainState:
        settings = self.settings
        _make_workdir(self.workdir, self.config)
        key = jax.random.key(settings.seed)
        step_args = dict(
            network=settings.model, optim=settings.optimizer, step=settings.step, mesh=self.mesh
        )
        with checkpoint.Checkpoints(self.workdir, keep=settings.keep_checkpoints) as checkpoints:
            first, state = self._start(checkpoints)
            with self._reporter(first) as reporter:
                pace = _Pace(self.batch_size * settings.data.clip_len)
                waiting = None  # metrics are fetched a step late, so the device never waits for us
                for step in range(first + 1, self.total_steps + 1):
                    batch = parallel.to_devices(next(self.batches), self.mesh)
                    state, metrics = training.train_step(state, batch, key, **step_args)
                    waiting = _report(waiting, reporter, pace)
                    if step % settings.log_every_steps == 0 or step == self.total_steps:
                        waiting = step, metrics
                    if self._is_pause(step):
                        waiting = _report(waiting, reporter, pace)
                        state = self._pause(step, state, reporter, checkpoints)
                        pace.restart(step)
        return state

    def _start(self, checkpoints: checkpoint.Checkpoints) -> tuple[int, TrainState]:
        """A fresh state, or the last one saved, with the data put in its place."""
        settings = self.settings
        fresh = lambda: training.init_state(settings.model, settings.optimizer, settings.seed)
        shapes = jax.eval_shape(fresh)
        make = jax.jit(fresh, out_shardings=parallel.placement(shapes, self.mesh))
        first = checkpoints.latest()
        if first is None:
            return 0, make()
        like = parallel.abstract(shapes, self.mesh)
        state, position = checkpoints.restore(like)
        if position:
            self.batches.set_state(json.loads(position))
        print(f"continuing from step {first} of {self.total_steps} in {self.workdir}")
        return first, state

    def _reporter(self, first: int) -> report.Reporter:
        return report.open_reporter(
            self.workdir,
            total_steps=self.total_steps,
            wandb=self.settings.wandb,
            run_config=self.config,
            resume_step=first or None,
            enabled=jax.process_index() == 0,
        )

    def _ends_epoch(self, step: int) -> bool:
        return step % self.batches.per_epoch == 0

    def _is_pause(self, step: int) -> bool:
        """Whether something other than training happens after this step."""
        settings = self.settings
        cadences = settings.val_every_steps, settings.rollout_every_steps, settings.ckpt_every_steps
        return (
            any(step % every == 0 for every in cadences)
            or self._ends_epoch(step)
            or step == self.total_steps
        )

    def _pause(self, step, state: TrainState, reporter, checkpoints) -> TrainState:
        settings, last = self.settings, step == self.total_steps
        weights = training.weights_to_sample(state)
        if step % settings.val_every_steps == 0:
            results = evaluate.validation(settings.model, weights, self.validation, self.mesh)
            reporter.scalars(step, dict(results))
        if step % settings.rollout_every_steps == 0 or last:
            self._draw(step, weights, reporter)
        if self._ends_epoch(step):
            batches = self.whole_validation
            results = evaluate.epoch_end(settings.model, weights, batches, self.mesh)
            loss_sum, count = state.epoch_loss
            reporter.scalars(step, {"epoch/train_loss": loss_sum / count, **dict(results)})
            state = state._replace(epoch_loss=state.epoch_loss * 0)
        if step % settings.ckpt_every_steps == 0 or self._ends_epoch(step) or last:
            position = json.dumps(self.batches.get_state())
            checkpoints.save(state, data_position=position, config=self.config)
            self._draw_curves()
        return state

    def _draw_curves(self) -> None:
        if jax.process_index() == 0:
            series = metrics_file.read_series(self.workdir / report.METRICS_FILE)
            curves.curves(series, self.workdir / "curves.png")

    def _draw(self, step: int, weights, reporter) -> None:
        """A rollout from validation clips, as a film and a sheet; by the first process alone."""
        weights = parallel.whole(weights, self.mesh)
        if jax.process_index():
            return
        settings, name = self.settings, f"rollout_{step:07d}"
        sampler = Sampler(settings.model, parallel.local(weights), settings.sampler)
        mp4 = self.workdir / "rollouts" / f"{name}.mp4"
        key = jax.random.key(settings.seed)
        frames = rollouts.write(sampler, self.script, mp4, key=key)
        png = mp4.with_suffix(".png")
        video.write_png(png, sheet.grid(self.script.real, frames, n_prompt=settings.n_prompt))
        reporter.video(step, "rollout/video", mp4)
        reporter.image(step, "rollout/grid", png)


def _report(waiting, reporter: report.Reporter, pace: "_Pace") -> None:
    """Reports a step's metrics, if any wait for it; blocks until the device has done that step."""
    if waiting:
        step, metrics = waiting
        reporter.scalars(step, jax.device_get(metrics) | pace.since_last(step))


class _Pace:
    """How fast training goes, its pauses not counted."""

    def __init__(self, frames_per_step: int):
        self._frames = frames_per_step
        self._step, self._time = None, 0.0

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        """Rates since the last call or `restart`; none before there is one (that time compiles)."""
        last, then = self._step, self._time
        self.restart(step)
        if last is None or last == step:
            return {}
        rate = (step - last) / (self._time - then)
        return {"perf/steps_per_sec": rate, "perf/frames_per_sec": rate * self._frames}


def _make_workdir(workdir: Path, config: dict) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror}") from None
