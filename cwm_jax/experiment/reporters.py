"""Reports a run's metrics and media: to the terminal, `metrics.jsonl`, W&B and TensorBoard."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from tqdm import tqdm

from cwm_jax.errors import echo
from cwm_jax.experiment.metrics_file import MetricsFile
from cwm_jax.experiment.tensorboard_run import open_tensorboard
from cwm_jax.experiment.wandb_run import WandbConfig, open_wandb
from cwm_jax.rendering.video import write_png

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """A destination of reports."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def media(self, step: int, name: str, path: Path, kind: str) -> None:
        """`kind` is "video" (an mp4) or "image" (a PNG)."""

    def close(self, *, failed: bool = False) -> None: ...


class Reporter:
    """Passes every number and picture to each of its sinks; a context manager.

    A sink that fails is removed, which is logged.

    Steps may not decrease. A name is reported once per step: the first value counts.

    Args:
        workdir: where pictures given as arrays are written, under `media/`.
        sinks: destinations of reports; with none, reporting does nothing.
    """

    def __init__(self, workdir: str | os.PathLike, sinks: Sequence[Sink]):
        self._workdir = Path(workdir)
        self._sinks = tuple(sinks)
        self._step = 0
        self._names: set[str] = set()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports numbers (anything `float` accepts; it waits for JAX scalars)."""
        if not self._sinks:
            return
        fresh = self._fresh(step, values)
        numbers = {name: float(values[name]) for name in fresh}
        if numbers:
            self._send(lambda sink: sink.scalars(step, numbers))

    def video(self, step: int, name: str, path: str | os.PathLike) -> None:
        """Reports an mp4 that has been written to `path`."""
        self._media(step, name, Path(path), "video")

    def image(self, step: int, name: str, image: np.ndarray | str | os.PathLike) -> None:
        """Reports a picture: a PNG's path, or uint8 [H, W, 3] to be written under `media/`."""
        if not self._sinks:
            return
        if isinstance(image, np.ndarray):
            path = self._workdir / "media" / f"{name.replace('/', '_')}_{step:08d}.png"
            write_png(path, image)
        else:
            path = Path(image)
        self._media(step, name, path, "image")

    def close(self, *, failed: bool = False) -> None:
        """Closes every sink, even if others fail; `failed` marks a run that ended with an error."""
        self._send(lambda sink: sink.close(failed=failed))
        self._sinks = ()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(failed=error is not None)

    def _media(self, step: int, name: str, path: Path, kind: str) -> None:
        if self._sinks and self._fresh(step, [name]):
            self._send(lambda sink: sink.media(step, name, path, kind))

    def _send(self, give: Callable[[Sink], None]) -> None:
        """Calls every sink; a sink that fails is removed: training does not need it."""
        for sink in self._sinks:
            try:
                give(sink)
            except Exception as error:
                self._sinks = tuple(other for other in self._sinks if other is not sink)
                name = type(sink).__name__
                echo(f"WARNING: {name} failed and is disabled: {type(error).__name__}: {error}")

    def _fresh(self, step: int, names: Sequence[str] | Mapping) -> list[str]:
        if step < self._step:
            raise ValueError(f"step {step} was reported after step {self._step}")
        if step > self._step:
            self._step, self._names = step, set()
        fresh = [name for name in names if name not in self._names]
        self._names.update(fresh)
        return fresh


def open_reporter(
    workdir: str | os.PathLike,
    *,
    total_steps: int | None,
    wandb: WandbConfig,
    run_config: Mapping[str, Any],
    tensorboard: bool = False,
    resume_step: int | None = None,
    enabled: bool = True,
) -> Reporter:
    """The reporter of a training run.

    Args:
        workdir: the run's folder; gets `metrics.jsonl`, `wandb_run_id.txt`, `media/`, `wandb/`.
        total_steps: the end of the progress bar; None where unknown.
        wandb: whether and where to show the run on the web.
        run_config: the run's settings, a plain nested dict, sent to W&B.
        tensorboard: whether to write event files for TensorBoard, under `tensorboard/`.
        resume_step: the step of the checkpoint that training resumes from; None for a new run.
        enabled: False in every process but the first, which then report nothing.

    Raises:
        UserError: the workdir cannot be written.
    """
    if not enabled:
        return Reporter(workdir, ())
    workdir = Path(workdir)
    sinks: list[Sink] = [MetricsFile(workdir / METRICS_FILE, resume_step=resume_step)]
    run = open_wandb(wandb, workdir, run_config=run_config, resuming=resume_step is not None)
    sinks += [run] if run else []
    if tensorboard:
        events = open_tensorboard(workdir, run_config=run_config, resume_step=resume_step)
        sinks += [events] if events else []
    sinks.append(Terminal(total_steps, first_step=resume_step or 0))
    return Reporter(workdir, sinks)


class Terminal:
    """A progress bar with the training loss, and a line for every other result.

    Without a terminal, such as in a log file, there is no bar, and a line for every report.
    """

    def __init__(
        self, total_steps: int | None, *, first_step: int = 0, stream: TextIO | None = None
    ):
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            file=self._stream,
            dynamic_ncols=True,
            disable=None,  # off unless the stream is a terminal
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        in_training = "train/loss" in values
        if in_training and not self._bar.disable:
            with contextlib.suppress(OSError):  # as in _write
                self._bar.set_postfix_str(f"loss {values['train/loss']:.4f}", refresh=False)
                self._bar.update(step - self._bar.n)
            return
        words = [f"{name} {value:.4g}" for name, value in values.items()]
        pace = values.get("perf/steps_per_sec", 0)
        if in_training and pace > 0 and self._total and step < self._total:
            words.append(f"{tqdm.format_interval((self._total - step) / pace)} left")
        self._write(step, "  ".join(words))

    def media(self, step: int, name: str, path: Path, kind: str) -> None:
        self._write(step, f"{name} → {path}")

    def close(self, *, failed: bool = False) -> None:
        self._bar.close()

    def _write(self, step: int, words: str) -> None:
        total = f"/{self._total}" if self._total else ""
        width = len(total) - 1 if total else 0
        with contextlib.suppress(OSError):  # such as a log on a full disk
            tqdm.write(f"step {step:>{width}}{total}  {words}", file=self._stream)
