"""What a run measures between training steps: validation, quick evaluation, rollouts and plots."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh

from cwm_jax.errors import UserError, echo
from cwm_jax.evaluation import generation, quick, single_step
from cwm_jax.experiment import metrics_file, reporters
from cwm_jax.experiment.run_data import RunData
from cwm_jax.experiment.settings import Settings
from cwm_jax.models.config import DiTConfig
from cwm_jax.rendering import contact_sheet, video
from cwm_jax.runtime import preemption, random_numbers, sharding
from cwm_jax.sampling import rollouts
from cwm_jax.sampling.sampler import Sampler
from cwm_jax.training import train_step
from cwm_jax.training.train_step import TrainState

Result = TypeVar("Result")


class Measurements:
    """Measures a model and reports the results. Every process must call the same methods.

    A measurement that fails is logged and does not end training.

    Args:
        network: with the kernels of this device, for losses; rollouts use `settings.model`.
        data: of the run.
        workdir: gets `rollouts/` and `curves.png`.
    """

    def __init__(
        self,
        settings: Settings,
        network: DiTConfig,
        data: RunData,
        mesh: Mesh | None,
        workdir: Path,
        reporter: reporters.Reporter,
    ):
        self._settings, self._network, self._data = settings, network, data
        self._mesh, self._workdir, self._reporter = mesh, workdir, reporter

    def validation(self, step: int, weights, batches: Iterable) -> float | None:
        """The loss of validation batches, which is also reported; None if it failed."""
        return _attempt("validate", lambda: self._validate(step, weights, batches))

    def epoch(self, step: int, state: TrainState, batches: Iterable) -> None:
        """The mean training loss of an epoch, and losses of all validation batches."""
        _attempt("measure the epoch", lambda: self._measure_epoch(step, state, batches))

    def rollouts(self, step: int, weights, *, scores: bool, videos: bool) -> None:
        """Generates frames in the first process: the quick evaluation's, and videos."""
        weights = sharding.whole(weights, self._mesh)
        if jax.process_index():
            return
        sampler = _attempt("prepare rollouts", lambda: self._sampler(weights), alone=True)
        if scores and sampler:
            _attempt("score rollouts", lambda: self._evaluate(step, sampler), alone=True)
        if videos and sampler:
            _attempt(
                "write a rollout video", lambda: self._write_rollout(step, sampler), alone=True
            )

    def plot_curves(self) -> None:
        """Writes `curves.png` from all metrics so far, in the first process."""
        if jax.process_index() == 0:
            _attempt("plot curves.png", self._plot_curves, alone=True)

    def _validate(self, step: int, weights, batches) -> float:
        results = dict(single_step.validation(self._network, weights, batches, self._mesh))
        self._reporter.scalars(step, results)
        return results["val/loss"]

    def _measure_epoch(self, step: int, state: TrainState, batches) -> None:
        weights = train_step.weights_to_sample(state)
        results = single_step.epoch_end(self._network, weights, batches, self._mesh)
        loss_sum, count = sharding.local(sharding.whole(state.epoch_loss, self._mesh))
        self._reporter.scalars(step, {"epoch/train_loss": loss_sum / count, **dict(results)})

    def _sampler(self, weights) -> Sampler:
        settings = self._settings
        return Sampler(settings.model, sharding.local(weights), settings.rollout_sampler)

    def _evaluate(self, step: int, sampler: Sampler) -> None:
        results = quick.run(generation.by_sampler(sampler), self._data.quick)
        self._reporter.scalars(step, dict(results))

    def _write_rollout(self, step: int, sampler: Sampler) -> None:
        """Writes rollouts from validation clips, as a video and a contact sheet."""
        settings, name = self._settings, f"rollout_{step:07d}"
        script, mp4 = self._data.script, self._workdir / "rollouts" / f"{name}.mp4"
        frames = rollouts.write(sampler, script, mp4, key=random_numbers.key(settings.seed))
        png = mp4.with_suffix(".png")
        sheet = contact_sheet.grid(script.real, frames, n_prompt=settings.rollouts.n_prompt)
        video.write_png(png, sheet)
        self._reporter.video(step, "rollout/video", mp4)
        self._reporter.image(step, "rollout/grid", png)

    def _plot_curves(self) -> None:
        from cwm_jax.rendering import plots  # imports Matplotlib, which training does not need

        series = metrics_file.read_series(self._workdir / reporters.METRICS_FILE)
        if any(name.endswith("loss") for name in series):  # there are none before the first log
            plots.curves(series, self._workdir / "curves.png")


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
