"""The results of a campaign: a line of JSON for every trial, and a table of them all."""

import collections
import dataclasses
import json
from pathlib import Path

from cwm_jax.errors import UserError
from tests.faults.trials import Trial


class Ledger:
    """The trials so far by the name of their fault; with a file, also those of earlier campaigns.

    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.trials: dict[str, list[Trial]] = collections.defaultdict(list)
        for line in path.read_text().splitlines() if path and path.exists() else ():
            try:
                record = json.loads(line)
                self.trials[record.pop("name")].append(Trial(**record))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path} is not a file of trials: {line[:80]!r}") from None

    def add(self, name: str, trial: Trial) -> None:
        self.trials[name].append(trial)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"name": name, **dataclasses.asdict(trial)}) + "\n")

    def times(self, name: str) -> int:
        """How often the fault was injected."""
        return sum(trial.times for trial in self.trials[name])

    def lost(self) -> bool:
        return any(trial.faults for trials in self.trials.values() for trial in trials)

    def table(self, skipped: dict[str, str]) -> str:
        """The results as a Markdown table."""
        lines = [
            "| Fault | Times tried | Runs | Runs survived | Steps done again | Saved data lost |",
            "|---|---|---|---|---|---|",
        ]
        moments = collections.Counter()
        for trials in filter(None, self.trials.values()):
            fault, well = trials[0].fault, [trial for trial in trials if not trial.faults]
            times, redone = sum(t.times for t in trials), sum(t.redone for t in trials)
            lost = "none" if len(well) == len(trials) else f"in {len(trials) - len(well)} runs"
            lines.append(f"| {fault} | {times} | {len(trials)} | {len(well)} | {redone} | {lost} |")
            moments.update((fault, moment) for trial in trials for moment in trial.moments)
        lines += [f"| {name} | skipped: {why} | | | | |" for name, why in skipped.items()]
        lines += ["", *(f"- {f}: {moment}, {n}" for (f, moment), n in sorted(moments.items()))]
        return "\n".join(lines)
