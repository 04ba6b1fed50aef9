"""Where trials happen: a folder of runs, what they should come to, and how they are judged."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path

from tests.faults import life
from tests.faults.life import Life


class Skipped(Exception):  # noqa: N818
    """This machine does not allow the fault to be tried."""


@dataclasses.dataclass
class Trial:
    """One fault done to one run."""

    fault: str
    times: int = 1  # how often it was done
    faults: list[str] = dataclasses.field(default_factory=list)  # what went wrong; none: survived
    moments: list[str] = dataclasses.field(default_factory=list)  # what it hit
    redone: int = 0  # steps that had to be done again

    def expect(self, right: bool, otherwise: str) -> None:
        if not right:
            self.faults.append(otherwise)


class Arena:
    """A folder for runs, their data, and what an undisturbed run comes to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = life.write_data(folder / "data")
        self._count = itertools.count(1)
        self._references: dict[str, tuple] = {}
        self._half_done: dict[int, Path] = {}
        self._lock = threading.RLock()

    def workdir(self) -> Path:
        return self.folder / f"run{next(self._count):04d}"

    def config(self, **changes) -> dict:
        return life.config_of(self.data, **changes)

    def own_data(self, workdir: Path) -> Path:
        """A copy of the data that a fault may spoil."""
        return Path(shutil.copytree(self.data, workdir.with_suffix(".data")))

    def reference(self, sabotage: tuple = (), **changes) -> tuple:
        """(digest, measured values) of a run that nothing but `sabotage` disturbs."""
        key = json.dumps([sabotage, changes])
        with self._lock:
            if key not in self._references:
                workdir = self.workdir()
                run = Life(workdir, self.config(**changes), sabotage=sabotage)
                if code := run.end():
                    raise RuntimeError(f"the undisturbed run ended with {code}:\n{run.words}")
                self._references[key] = life.ending(workdir), life.measured(workdir)
            return self._references[key]

    def half_done(self, step: int) -> Path:
        """A copy of a run that was killed before that step; from step 7 it has two checkpoints."""
        with self._lock:
            if step not in self._half_done:
                first = self.workdir()
                Life(first, self.config(), sabotage=("signal", step, 9)).end()
                self._half_done[step] = first
        return Path(shutil.copytree(self._half_done[step], self.workdir()))

    def judge(self, trial: Trial, workdir: Path, reference: tuple) -> Trial:
        """Whether the run came to what an undisturbed one came to."""
        digest, measured = reference
        trial.expect(life.ending(workdir) == digest, "other parameters at the end")
        found = life.measured(workdir)
        if found != measured:
            missing = [item[:2] for item in measured if item not in found]
            extra = [item[:2] for item in found if item not in measured]
            trial.expect(False, f"other metrics: missing {missing[:4]}, extra {extra[:4]}")
        return trial

    def finish(
        self, trial: Trial, workdir: Path, reference: tuple, config: dict, **options
    ) -> Trial:
        """Starts the run once more, lets it end, and judges it."""
        before = life.saved_steps(workdir)
        run = Life(workdir, config, **options)
        code = run.end()
        trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
        if before:
            trial.expect(f"continuing from step {before[-1]} " in run.words, "lost a checkpoint")
        return self.judge(trial, workdir, reference) if code == 0 else trial
