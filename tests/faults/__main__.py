"""Injects faults into small training runs for a given time, and prints a table.

    python -m tests.faults --minutes 60 --results faults.jsonl [--only kill_9,disk_full] [--jobs 2]

The exit code is 0 if every run survived. A run survives if it reports the fault and
ends, restarted where needed, with the same parameters, optimizer state and metrics as an
uninterrupted run. With `--results`, an interrupted campaign continues.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from tests.faults import training_process
from tests.faults.campaign import FAULTS
from tests.faults.ledger import Ledger
from tests.faults.trials import Skipped, Trial, Workspace

_SHARES = {"kill_9": 5}  # more variants than other faults, which have 1


def main() -> int:
    args = _flags().parse_args()
    names = args.only.split(",") if args.only else list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        raise SystemExit(f"no such fault: {unknown[0]}; there are {', '.join(FAULTS)}")
    with shown_to_user():
        ledger = Ledger(args.results)
    training_process.start_fork_server()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=args.folder) as folder:
        campaign = Campaign(
            Workspace(Path(folder)), ledger, names, seed=args.seed, times=args.times
        )
        campaign.run(args.jobs, 60 * args.minutes)
    print(ledger.table(campaign.skipped))
    return int(ledger.lost())


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="no new run after this (%(default)s)")
    add("--times", type=int, default=20, help="enough of each fault; kill -9: 5 × (%(default)s)")
    add("--results", type=path_flag, help="a file to add every trial to, and to continue from")
    add("--only", default="", help="faults to try, by name: " + ", ".join(FAULTS))
    add("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    add("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    add("--folder", type=path_flag, help="where runs are written (the system's temporary folder)")
    return parser


class Campaign:
    """Tries the faults, the least tried first, until all are done or the time is over."""

    def __init__(
        self, workspace: Workspace, ledger: Ledger, names: list[str], *, seed: int, times: int
    ):
        self.skipped: dict[str, str] = {}
        self._arena, self._ledger, self._seed = workspace, ledger, seed
        self._wanted = {name: times * _SHARES.get(name, 1) for name in names}
        self._under_way = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    def run(self, jobs: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._arena.reference()
        with ThreadPoolExecutor(jobs) as pool:
            for worker in [pool.submit(self._work, end) for _ in range(jobs)]:
                worker.result()

    def _work(self, end: float) -> None:
        while time.monotonic() < end:
            with self._lock:
                name = self._least_tried()
                if name is None:
                    return
                number = len(self._ledger.trials[name]) + self._under_way[name]
                self._under_way[name] += 1
            self._try(name, random.Random(f"{self._seed} {name} {number}"))

    def _least_tried(self) -> str | None:
        def part(name: str) -> float:
            return (self._ledger.times(name) + self._under_way[name]) / self._wanted[name]

        left = [name for name in self._wanted if name not in self.skipped and part(name) < 1]
        return min(left, key=part, default=None)

    def _try(self, name: str, rng: random.Random) -> None:
        began = time.monotonic()
        try:
            trial = FAULTS[name](self._arena, rng)
        except Skipped as skipped:
            self.skipped[name] = str(skipped)
            print(f"{name}: SKIPPED, {skipped}", flush=True)
            return
        except Exception:  # an error of the campaign: recorded, and does not end it
            trial = Trial(name, faults=[traceback.format_exc()])
        with self._lock:
            self._under_way[name] -= 1
            self._ledger.add(name, trial)
        words = "survived" if not trial.faults else "FAILED: " + "; ".join(trial.faults)
        moments = f" ({', '.join(trial.moments)})" if trial.moments else ""
        seconds = time.monotonic() - began
        print(f"{trial.fault} × {trial.times}{moments}: {words}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
