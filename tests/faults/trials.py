"""Trials of faults: their folder of runs, the expected results, and the comparison."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path

from tests.faults import training_process
from tests.faults.training_process import TrainingProcess


class Skipped(Exception):  # noqa: N818
    """The fault cannot be injected on this machine."""


@dataclasses.dataclass
class Trial:
    """One fault injected into one run."""

    fault: str
    times: int = 1  # how often it was injected
    faults: list[str] = dataclasses.field(default_factory=list)  # what went wrong; none: survived
    moments: list[str] = dataclasses.field(default_factory=list)  # what the run was doing
    redone: int = 0  # steps that had to be repeated

    def expect(self, right: bool, otherwise: str) -> None:
        if not right:
            self.faults.append(otherwise)


class Workspace:
    """A folder for runs, their data, and the results of uninterrupted runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = training_process.write_data(folder / "data")
        self._count = itertools.count(1)
        self._references: dict[str, tuple] = {}
        self._interrupted: dict[int, Path] = {}
        self._lock = threading.RLock()

    def workdir(self) -> Path:
        return self.folder / f"run{next(self._count):04d}"

    def config(self, **changes) -> dict:
        return training_process.config_of(self.data, **changes)

    def own_data(self, workdir: Path) -> Path:
        """A copy of the data that a fault may damage."""
        return Path(shutil.copytree(self.data, workdir.with_suffix(".data")))

    def reference(self, injection: tuple = (), **changes) -> tuple:
        """(digest, metrics) of a run without faults other than `injection`."""
        key = json.dumps([injection, changes])
        with self._lock:
            if key not in self._references:
                workdir = self.workdir()
                run = TrainingProcess(workdir, self.config(**changes), injection=injection)
                if code := run.end():
                    raise RuntimeError(f"the uninterrupted run ended with {code}:\n{run.output}")
                self._references[key] = (
                    training_process.final_digest(workdir),
                    training_process.measured(workdir),
                )
            return self._references[key]

    def interrupted(self, step: int) -> Path:
        """A copy of a run that was killed before that step; from step 7 it has two checkpoints."""
        with self._lock:
            if step not in self._interrupted:
                first = self.workdir()
                TrainingProcess(first, self.config(), injection=("signal", step, 9)).end()
                self._interrupted[step] = first
        return Path(shutil.copytree(self._interrupted[step], self.workdir()))

    def judge(self, trial: Trial, workdir: Path, reference: tuple) -> Trial:
        """Compares the run's results with those of an uninterrupted one."""
        digest, measured = reference
        trial.expect(
            training_process.final_digest(workdir) == digest, "other parameters at the end"
        )
        found = training_process.measured(workdir)
        if found != measured:
            missing = [item[:2] for item in measured if item not in found]
            extra = [item[:2] for item in found if item not in measured]
            trial.expect(False, f"other metrics: missing {missing[:4]}, extra {extra[:4]}")
        return trial

    def finish(
        self, trial: Trial, workdir: Path, reference: tuple, config: dict, **options
    ) -> Trial:
        """Starts the run again, waits for its end, and compares it."""
        before = training_process.saved_steps(workdir)
        run = TrainingProcess(workdir, config, **options)
        code = run.end()
        trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
        if before:
            trial.expect(f"resuming from step {before[-1]} " in run.output, "lost a checkpoint")
        return self.judge(trial, workdir, reference) if code == 0 else trial
