"""Does faults to small training runs for a given time, and ends with a table.

    python -m tests.faults --minutes 60 [--only kill_9,disk_full] [--jobs 2] [--seed 0]

The exit code is 0 if every run survived. A run survives if what must be told was told, and it
ends, after a restart where one is due, with the same parameters, optimizer state and metrics as a
run that nothing disturbed.
"""

import argparse
import collections
import random
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import life
from tests.faults.campaign import FAULTS, Arena, Skipped, Trial


def main() -> int:
    args = _flags().parse_args()
    names = args.only.split(",") if args.only else list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        raise SystemExit(f"no such fault: {unknown[0]}; there are {', '.join(FAULTS)}")
    life.get_ready()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=args.folder) as folder:
        campaign = Campaign(Arena(Path(folder)), names, args.seed, 60 * args.minutes)
        campaign.run(args.jobs)
    print(table(campaign.trials, campaign.skipped))
    return int(any(trial.faults for trial in campaign.trials))


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="no new run after this (%(default)s)")
    add("--only", default="", help="faults to try, by name: " + ", ".join(FAULTS))
    add("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    add("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    add("--folder", type=Path, help="where runs are written (the system's temporary folder)")
    return parser


class Campaign:
    """Tries the faults in turn, again and again, until the time is over."""

    def __init__(self, arena: Arena, names: list[str], seed: int, seconds: float):
        self.trials: list[Trial] = []
        self.skipped: dict[str, str] = {}
        self._arena, self._seed = arena, seed
        self._end = time.monotonic() + seconds
        # Two kills -9 for each of the others: there are most ways to be killed.
        self._names = [name for n in names for name in [n] * (2 if n == "kill_9" else 1)]
        self._lock, self._begun = threading.Lock(), 0

    def run(self, jobs: int) -> None:
        self._arena.reference()
        with ThreadPoolExecutor(jobs) as pool:
            for worker in [pool.submit(self._work) for _ in range(jobs)]:
                worker.result()

    def _work(self) -> None:
        while time.monotonic() < self._end:
            with self._lock:
                number, self._begun = self._begun, self._begun + 1
            name = self._names[number % len(self._names)]
            if name not in self.skipped:
                self._try(name, number)

    def _try(self, name: str, number: int) -> None:
        began = time.monotonic()
        try:
            trial = FAULTS[name](self._arena, random.Random(f"{self._seed} {number}"))
        except Skipped as skipped:
            self.skipped[name] = str(skipped)
            print(f"{name}: SKIPPED, {skipped}", flush=True)
            return
        except Exception:  # a fault of the campaign, which must be seen, and not end it
            trial = Trial(name, faults=[traceback.format_exc()])
        self.trials.append(trial)
        words = "survived" if not trial.faults else "FAILED: " + "; ".join(trial.faults)
        moments = f" ({', '.join(trial.moments)})" if trial.moments else ""
        seconds = time.monotonic() - began
        print(f"{trial.fault} × {trial.times}{moments}: {words}, {seconds:.0f} s", flush=True)


def table(trials: list[Trial], skipped: dict[str, str]) -> str:
    """The outcome, as Markdown."""
    lines = [
        "| Fault | Times tried | Runs | Runs survived | Steps done again | Saved data lost |",
        "|---|---|---|---|---|---|",
    ]
    moments = collections.Counter()
    for fault in dict.fromkeys(trial.fault for trial in trials):
        of_it = [trial for trial in trials if trial.fault == fault]
        well = [trial for trial in of_it if not trial.faults]
        times, redone = sum(t.times for t in of_it), sum(t.redone for t in of_it)
        lost = "none" if len(well) == len(of_it) else f"in {len(of_it) - len(well)} runs"
        lines.append(f"| {fault} | {times} | {len(of_it)} | {len(well)} | {redone} | {lost} |")
        moments.update((fault, moment) for trial in of_it for moment in trial.moments)
    lines += [f"| {name} | skipped: {why} | | | | |" for name, why in skipped.items()]
    lines += ["", *(f"- {f}: {moment}, {n}" for (f, moment), n in sorted(moments.items()))]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
