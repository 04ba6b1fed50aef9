"""Metrics and speed of training steps, and the handling of updates that are not finite."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from cwm_jax.errors import UserError, echo
from cwm_jax.experiment.reporters import Reporter
from cwm_jax.files import written_whole

FOLDER = "post-mortem"


class Progress:
    """Reads each step's metrics while the next step runs, so that the device never waits.

    Args:
        workdir: gets `post-mortem/step_0000123.json` for every update that was skipped
            because its loss or gradient was not finite.
        clips_of: the locations in the data of the clips of a step's batch.
        frames_per_step: for the frame rate.
        skipped: updates skipped before; more than `max_skipped` stop the run.
        kernels: the network's kernels by setting, such as {"attention": "fused"}.
    """

    def __init__(
        self,
        reporter: Reporter,
        workdir: Path,
        clips_of: Callable[[int], list[dict]],
        *,
        frames_per_step: int,
        skipped: int,
        max_skipped: int,
        kernels: Mapping[str, str] | None = None,
    ):
        self._reporter, self._workdir, self._clips_of = reporter, workdir, clips_of
        self._pace = _Pace(frames_per_step)
        self._skipped, self._max_skipped = skipped, max_skipped
        self._kernels = kernels or {}
        self._waiting = None

    def after(self, step: int, metrics: dict[str, jax.Array], *, reported: bool) -> None:
        """Adds the metrics of a step just started; with `reported` they are reported later.

        Raises `UserError` if the previous step exceeded the number of updates to skip.
        """
        self.catch_up()
        self._waiting = step, metrics, reported

    def catch_up(self) -> None:
        """Waits for the last step; raises `UserError` as `after` does."""
        if self._waiting is None:
            return
        (step, metrics, reported), self._waiting = self._waiting, None
        skipped = int(metrics["train/skipped"])
        if skipped > self._skipped:
            self._skipped = skipped
            self._handle_skipped(step, jax.device_get(metrics))
        if reported:
            self._reporter.scalars(step, jax.device_get(metrics) | self._pace.since_last(step))

    def restart(self, step: int) -> None:
        """Excludes the time since the last step from the speed."""
        self._pace.restart(step)

    def _handle_skipped(self, step: int, metrics: dict) -> None:
        path = self._workdir / FOLDER / f"step_{step:07d}.json"
        loss = float(metrics["train/loss"])
        if jax.process_index() == 0:
            self._write_record(path, step, metrics)
        what = f"loss {loss}" if not math.isfinite(loss) else "an infinite gradient"
        message = f"step {step} has {what}; its update was skipped, and its clips are in {path}"
        if self._kernels:
            used = ", ".join(f"{name}={kernel}" for name, kernel in self._kernels.items())
            message += f"; the step was computed with {used}"
        if self._skipped > self._max_skipped:
            raise UserError(
                f"{message}\nStopped, as config.optimizer.max_skipped_updates={self._max_skipped}. "
                f"The last checkpoint is finite. A lower config.optimizer.lr may help, or a larger "
                f"max_skipped_updates."
                f"{self._other_kernels()}"
            )
        count = f"{self._skipped} of at most {self._max_skipped}"
        echo(f"warning: {message} ({count})")

    def _write_record(self, path: Path, step: int, metrics: dict) -> None:
        """Writes a record for later analysis; a failure is only logged."""
        values = {name: repr(float(value)) for name, value in metrics.items()}
        try:
            record = {"step": step, "metrics": values, "clips": self._clips_of(step)}
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")
        except (UserError, OSError) as error:
            echo(f"warning: {path} could not be written: {error}")

    def _other_kernels(self) -> str:
        """How to exclude the kernels as the cause, if they are not XLA's already."""
        if set(self._kernels.values()) <= {"xla"}:
            return ""
        flags = " ".join(f"--config.model.{name}=xla" for name in self._kernels)
        return (
            "\nTo exclude a fault of these kernels, repeat the command with XLA's, which resumes "
            f"from the same checkpoint: {flags}"
        )


class _Pace:
    """Training speed without pauses."""

    def __init__(self, frames_per_step: int):
        self._frames = frames_per_step
        self._step, self._time = None, 0.0

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        """Rates since the last call or `restart`; none on the first call (that step compiles)."""
        last, then = self._step, self._time
        self.restart(step)
        if last is None or last == step:
            return {}
        rate = (step - last) / (self._time - then)
        return {"perf/steps_per_sec": rate, "perf/frames_per_sec": rate * self._frames}
