"""Records Procgen games, by default CoinRun, into a data folder for training.

    python -m cwm_jax.tools.collect --output data/mine --train 1000 --val 100 --test 100
    python -m cwm_jax.tools.collect --output data/maze --game maze --policy random=1,sticky=3

The simulator needs a separate environment, which the first call creates. After an interruption
(Ctrl-C), the same command continues from the complete shards. Each split has its own levels.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cwm_jax import __version__, controls, files
from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data import records, shards
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.simulator import game, venv

LEVELS = 500_000_000  # level seeds of each split; three times this stays below 2³¹


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines what is recorded; stored in `metadata.json`."""

    game: str
    policy: dict[str, float]
    difficulty: str
    seed: int
    records: dict[str, int]  # of each split
    records_per_shard: int
    chunk: int
    min_chunk: int

    def __post_init__(self):
        game.check_game(self.game)
        for split, count in self.records.items():
            _at_least(0, split, count)
        _at_least(1, "records-per-shard", self.records_per_shard)
        _at_least(1, "min-chunk", self.min_chunk)
        _at_least(self.min_chunk, "chunk", self.chunk)
        _at_least(0, "seed", self.seed)

    def shards(self, split: str) -> list[int]:
        """The number of records in each shard of a split."""
        whole, rest = divmod(self.records[split], self.records_per_shard)
        return [self.records_per_shard] * whole + [rest] * bool(rest)

    def recording(self, split: str, number: int) -> game.Recording:
        """The contents of shard `number` of a split, independent of the order of recording."""
        records = self.shards(split)[number]
        return game.Recording(
            game=self.game,
            first_level=shards.SPLITS.index(split) * LEVELS,
            num_levels=LEVELS,
            policy=self.policy,
            seed=(self.seed, zlib.crc32(split.encode()), number),
            records=records,
            chunk=self.chunk,
            min_chunk=self.min_chunk,
            num_envs=min(8, max(1, records // 12)),  # a dozen chunks each, so that episodes end
            difficulty=self.difficulty,
        )


def _at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise UserError(f"--{flag} {value}: must be {least} or more")


def parse_policy(text: str) -> dict[str, float]:
    """ "sticky" or "random=1,sticky=3" to weights.

    Raises:
        UserError: for an unknown policy or a weight that is no positive number.
    """
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if name not in game.POLICIES or not 0 < weights[name] < 1e9:
            raise UserError(
                f"--policy {text}: expected {' or '.join(game.POLICIES)}, or a mix by weight such "
                "as random=1,sticky=3"
            )
    return weights


class Ledger:
    """`metadata.json` during recording: the recipe, and the contents of each complete shard."""

    def __init__(self, folder: Path, recipe: Recipe):
        self._path, self._recipe = folder / controls.METADATA, recipe
        self._lock = threading.Lock()
        self.shards: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            try:
                self.shards = self._known(files.read_json_object(self._path))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self._path} was not written by this program ({error!r}); choose a new folder"
                ) from None
        elif folder.is_dir() and files.visible(folder):
            raise UserError(f"{folder} contains other files; choose a new folder")

    def _known(self, metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The existing shards of an earlier call with the same recipe."""
        now = dataclasses.asdict(self._recipe)
        then = metadata.get("recipe", {})
        for field, value in now.items():
            if then.get(field) != value and not (
                field == "records" and _grows(then.get(field), value)
            ):
                raise UserError(
                    f"{self._path} was made with {field}={then.get(field)}, not {value}; repeat "
                    "the same command to continue, or choose a new folder"
                )
        whole = {_name(s, n): count for s in shards.SPLITS for n, count in self._counts(s)}
        return {
            name: held
            for name, held in metadata["shards"].items()
            if (self._path.parent / name).is_file()
            and sum(held["lengths"].values()) == whole.get(name)  # others are recorded again
        }

    def _counts(self, split: str) -> Iterator[tuple[int, int]]:
        return enumerate(self._recipe.shards(split))

    def add(self, shard: str, held: dict[str, Any]) -> None:
        with self._lock:
            self.shards[shard] = held
            self.write()

    def write(self) -> None:
        metadata = {
            **controls.procgen(self._recipe.game).to_json(),
            "frame_shape": FRAME_SHAPE,
            "format": "as in the public dataset p-doom/coinrun-dataset, with extra fields",
            "extra_fields": ["rewards", "done", "level_seeds", "start"],
            "recipe": dataclasses.asdict(self._recipe),
            "versions": {"cwm_jax": __version__, "simulator": _simulator_versions()},
            "splits": {split: self._totals(split) for split in shards.SPLITS},
            "shards": dict(sorted(self.shards.items())),
        }
        with files.written_whole(self._path) as temporary:
            temporary.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")

    def _totals(self, split: str) -> dict[str, Any]:
        held = [v for k, v in self.shards.items() if k.startswith(f"{split}/")]
        lengths = collections.Counter()
        for shard in held:
            lengths.update({int(k): n for k, n in shard["lengths"].items()})
        first = shards.SPLITS.index(split) * LEVELS
        actions = np.sum([shard["actions"] for shard in held] or [[0] * NUM_ACTIONS], axis=0)
        return {
            "records": lengths.total(),
            "wanted": self._recipe.records[split],
            "frames": sum(length * n for length, n in lengths.items()),
            "lengths": dict(sorted(lengths.items())),
            "action_histogram": actions.tolist(),
            "level_seeds": [first, first + LEVELS - 1],
        }


def _grows(then: dict[str, int] | None, now: dict[str, int]) -> bool:
    """Whether more records are required than before: complete shards are kept."""
    return bool(then) and all(then.get(split, 0) <= count for split, count in now.items())


def _simulator_versions() -> list[str]:
    pins = venv.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [pin for pin in pins if pin.startswith(("procgen", "gym3", "numpy"))]


def collect(folder: Path, recipe: Recipe, *, python: Path, jobs: int) -> None:
    """Records a data folder, or its missing shards, `jobs` shards at a time.

    Raises:
        UserError: the folder contains something else, or the simulator failed.
    """
    ledger = Ledger(folder, recipe)
    ledger.write()
    for split in shards.SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for left in (folder / split).glob(".*.array_record"):  # of a call that was killed
            left.unlink()
    wanted = [(s, n) for s in shards.SPLITS for n in range(len(recipe.shards(s)))]
    missing = [place for place in wanted if _name(*place) not in ledger.shards]
    total = sum(recipe.records.values())
    have = sum(sum(held["lengths"].values()) for held in ledger.shards.values())
    with (
        tqdm(desc=recipe.game, total=total, initial=have, unit=" records", mininterval=1) as bar,
        contextlib.ExitStack() as stack,
    ):
        simulators = queue.SimpleQueue()  # the idle ones; each records one shard at a time
        for _ in range(min(jobs, len(missing))):
            simulators.put(stack.enter_context(game.Simulator(python)))
        stop = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        stack.callback(stop.set)  # runs first: unfinished shards stop and leave no files

        def make(place: tuple[str, int]) -> None:
            simulator = simulators.get()
            try:
                held = _write_shard(folder, recipe, *place, simulator, bar, stop)
            except BaseException:
                stop.set()  # or the others would continue to record
                raise
            finally:
                simulators.put(simulator)
            if held:
                ledger.add(_name(*place), held)

        for _ in pool.map(make, missing):
            pass


def _name(split: str, number: int) -> str:
    return f"{split}/data_{number:04d}.array_record"


class _StoppedError(Exception):
    """Another shard failed, or the user pressed Ctrl-C."""


def _write_shard(folder, recipe, split, number, simulator, bar, stop) -> dict[str, Any] | None:
    """Records one shard; returns its contents, or None if it was stopped."""
    lengths, actions = collections.Counter(), np.zeros(NUM_ACTIONS, int)

    def records() -> Iterator[bytes]:
        if stop.is_set():
            raise _StoppedError
        for chunk in simulator.record(recipe.recording(split, number)):
            if stop.is_set():
                raise _StoppedError
            lengths[len(chunk.episode)] += 1
            actions[:] += np.bincount(chunk.episode.actions, minlength=NUM_ACTIONS)
            yield _record(chunk)
            bar.update()

    try:
        with files.written_whole(folder / _name(split, number)) as temporary:
            shards.write_shard(temporary, records())
    except _StoppedError:
        return None
    return {"lengths": dict(sorted(lengths.items())), "actions": actions.tolist()}


def _record(chunk: game.Chunk) -> bytes:
    level_seeds = np.full(len(chunk.episode), chunk.level_seed, np.int32)
    extra = {"rewards": chunk.rewards, "done": chunk.done, "level_seeds": level_seeds}
    return records.encode(chunk.episode, {**extra, "start": chunk.start})


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        if args.jobs < 1:
            raise UserError(f"--jobs {args.jobs}: must be 1 or more")
        recipe = Recipe(
            game=args.game,
            policy=parse_policy(args.policy),
            difficulty=args.difficulty,
            seed=args.seed,
            records={split: getattr(args, split) for split in shards.SPLITS},
            records_per_shard=args.records_per_shard,
            chunk=args.chunk,
            min_chunk=args.min_chunk,
        )
        python = venv.ensure(args.environment)
        try:
            collect(args.output, recipe, python=python, jobs=args.jobs)
        except KeyboardInterrupt:
            raise UserError("interrupted; run the same command to continue") from None
        print(f"{args.output}: {json.dumps(recipe.records)} records of {recipe.game}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=path_flag, required=True, help="data folder to make or to continue")
    add("--game", default="coinrun", help="any game of Procgen by name (%(default)s)")
    add("--policy", default="random", help="random, sticky, or a mix: random=1,sticky=3 (random)")
    add("--difficulty", default="hard", choices=game.DIFFICULTIES, help="(%(default)s)")
    for split, count in zip(shards.SPLITS, (1000, 100, 100), strict=True):
        add(f"--{split}", type=int, default=count, help=f"records of {split} (%(default)s)")
    add("--records-per-shard", type=int, default=100, help="(%(default)s)")
    add("--chunk", type=int, default=160, help="frames in a record (%(default)s)")
    add("--min-chunk", type=int, default=32, help="shorter remainders of episodes are dropped (32)")
    add("--seed", type=int, default=0, help="of levels and actions (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="shards at a time (one for each core)")
    add("--environment", type=path_flag, help="the simulator's environment (.venv-procgen)")
    return parser


if __name__ == "__main__":
    main()
