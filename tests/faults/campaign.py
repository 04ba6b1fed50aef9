"""The faults, each tried on a run of its own and judged against an undisturbed run."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cwm_jax.stopping import EXIT_CODE
from tests.faults import life
from tests.faults.life import STEPS, Life

SHARDS = ("data_0000.array_record", "data_0001.array_record")


class Skipped(Exception):  # noqa: N818
    """This machine does not allow the fault to be tried."""


@dataclasses.dataclass
class Trial:
    """One fault done to one run."""

    fault: str
    times: int = 1  # how often it was done
    faults: list[str] = dataclasses.field(
        default_factory=list
    )  # what went wrong; nothing: survived
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
        self.seconds = 0.0
        self._count = itertools.count(1)
        self._references: dict[str, tuple] = {}
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
                workdir, began = self.workdir(), time.monotonic()
                run = Life(workdir, self.config(**changes), sabotage=sabotage)
                if code := run.end():
                    raise RuntimeError(f"the undisturbed run ended with {code}:\n{run.words}")
                self.seconds = self.seconds or time.monotonic() - began
                self._references[key] = life.ending(workdir), life.measured(workdir)
            return self._references[key]

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


def kill_9(arena: Arena, rng: random.Random) -> Trial:
    """SIGKILL at random moments until the run is through."""
    trial, workdir = Trial("kill -9", times=0), arena.workdir()
    reference, config = arena.reference(), arena.config()
    saved, reached = [], 0
    while True:
        run = Life(workdir, config)
        in_training = rng.random() < 0.8
        if in_training:  # else also while it starts
            run.until(lambda run=run: "continuing" in run.words or _last_step(workdir) > 0)
        code = run.wait(rng.uniform(0, 0.6 * arena.seconds))
        if code is None:
            run.kill()
            code = run.wait()
        if saved and "continuing" in run.words:
            trial.expect(f"continuing from step {saved[-1]} " in run.words, "lost a checkpoint")
            trial.redone += max(0, reached - saved[-1])
        if code == 0:
            return arena.judge(trial, workdir, reference)
        if code != -signal.SIGKILL:
            trial.expect(False, f"ended with {code}: {run.words[-400:]}")
            return trial
        trial.times += 1
        saved, reached = life.saved_steps(workdir), _last_step(workdir)
        trial.moments.append(_moment(workdir, run, saved, reached))


def _moment(workdir: Path, run: Life, saved: list[int], reached: int) -> str:
    """What the run was about when it was killed, as its folder tells."""
    if list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
        return "inside a checkpoint write"
    if list(workdir.glob(f"rollouts/.*.{run.pid}.*")):
        return "inside a rollout"
    if not saved:
        return "before the first save" if reached else "before the first step"
    return "between saves"


def _last_step(workdir: Path) -> int:
    try:
        line = (workdir / "metrics.jsonl").read_bytes().rsplit(b"\n", 2)[-2]
        return json.loads(line)["step"]
    except (OSError, IndexError, ValueError):
        return 0


def asked_to_stop(arena: Arena, rng: random.Random) -> Trial:
    """SIGTERM or SIGINT before a random step, again and again: exit 75, and not a step lost."""
    trial, workdir = Trial("SIGTERM or SIGINT", times=0), arena.workdir()
    reference, config = arena.reference(), arena.config()
    steps = sorted(rng.sample(range(1, STEPS + 1), 3))
    for step in steps:
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        run = Life(workdir, config, sabotage=("signal", step, int(number)))
        code = run.end()
        trial.times += 1
        trial.expect(code == EXIT_CODE, f"ended with {code}: {run.words[-400:]}")
        trial.expect(life.saved_steps(workdir)[-1:] == [step], "did not save the step it finished")
    return arena.finish(trial, workdir, reference, config)


def asked_twice(arena: Arena, rng: random.Random) -> Trial:
    """A second signal ends the process at once, and the run goes on from its last checkpoint."""
    trial, workdir = Trial("second signal"), arena.workdir()
    reference, config = arena.reference(), arena.config()
    run = Life(workdir, config)
    run.until(lambda: _last_step(workdir) >= rng.randrange(2, 20))
    run.kill(signal.SIGTERM)
    run.until(lambda: "Once more" in run.words)
    run.kill(signal.SIGTERM)
    code = run.wait(5)
    # It may have come to its end between the two.
    trial.expect(code in (-signal.SIGTERM, EXIT_CODE, 0), f"ended with {code}: {run.words[-400:]}")
    if code == 0:
        return arena.judge(trial, workdir, reference)
    return arena.finish(trial, workdir, reference, config)


def _half_done(arena: Arena, rng: random.Random) -> Path:
    """A run that was killed once it had two checkpoints."""
    workdir = arena.workdir()
    run = Life(workdir, arena.config(), sabotage=("signal", rng.randrange(10, STEPS), 9))
    run.end()
    return workdir


def damaged_checkpoint(arena: Arena, rng: random.Random) -> Trial:
    """A flipped bit, a cut file or a missing file in the newest checkpoint."""
    trial, reference = Trial("damaged checkpoint"), arena.reference()
    workdir = _half_done(arena, rng)
    *_, older, newest = life.saved_steps(workdir)
    folder = workdir / "checkpoints" / str(newest)
    listed = (folder / "SHA256SUMS").read_text().splitlines()
    files = [folder / line.split("  ")[1] for line in listed] + [folder / "SHA256SUMS"]
    files = [path for path in files if path.stat().st_size]
    victim = rng.choice(files)
    damage = rng.choice(("bit flipped", "file cut", "file missing"))
    if damage == "bit flipped":
        raw = bytearray(victim.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        victim.write_bytes(raw)
    elif damage == "file cut":
        os.truncate(victim, rng.randrange(victim.stat().st_size))
    else:
        victim.unlink()
    trial.moments.append(damage)
    run = Life(workdir, arena.config())
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
    trial.expect(f"{folder}: " in run.words, "did not name the checkpoint")
    trial.expect(f"continuing from step {older} " in run.words, "did not use the one before")
    trial.redone = newest - older
    return arena.judge(trial, workdir, reference) if code == 0 else trial


def half_line(arena: Arena, rng: random.Random) -> Trial:
    """A crash amid a line of metrics.jsonl."""
    trial, reference = Trial("metrics.jsonl cut mid-line"), arena.reference()
    workdir = _half_done(arena, rng)
    path, step = workdir / "metrics.jsonl", life.saved_steps(workdir)[-1]
    with path.open("a") as file:
        line = json.dumps({"step": step + 1, "train/loss": 0.5})
        file.write(line[: rng.randrange(1, len(line))])
    return arena.finish(trial, workdir, reference, arena.config())


def disk_full(arena: Arena, rng: random.Random) -> Trial:
    """A full disk, for some steps or to the end: training goes on, older checkpoints stay good."""
    trial, reference = Trial("disk full"), arena.reference()
    disk = arena.workdir()
    disk.mkdir()
    mounting = ("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk))
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        raise Skipped("a tmpfs cannot be mounted here")
    try:
        workdir, config = disk / "run", arena.config()
        begin = rng.randrange(4, 20)
        end = rng.choice((None, rng.randrange(begin + 1, STEPS + 1)))
        sabotage = "fill_disk", begin, (str(disk), end)
        run = Life(workdir, config, sabotage=sabotage, home=arena.folder)
        code = run.end()
        shouted = "could not be saved" in run.words or "cannot write" in run.words
        if end is None:
            trial.moments.append("full to the end")
            trial.expect(code == 2 and shouted, f"ended with {code}: {run.words[-400:]}")
            (disk / "filler").unlink()
            trial.redone = STEPS - max(life.saved_steps(workdir), default=0)
            return arena.finish(trial, workdir, reference, config, home=arena.folder)
        trial.moments.append("full for some steps")
        trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
        return arena.judge(trial, workdir, reference) if code == 0 else trial
    finally:
        subprocess.run(("umount", "-l", str(disk)), check=False)


def spoiled_shard(arena: Arena, rng: random.Random) -> Trial:
    """A shard flipped, cut or gone amid a run: stop with its name; mended, the run ends right."""
    what = rng.choice(("flip", "truncate", "vanish"))
    trial, reference = Trial("shard spoiled, stop"), arena.reference()
    workdir = arena.workdir()
    data = arena.own_data(workdir)
    shard = data / "train" / rng.choice(SHARDS)
    size = shard.stat().st_size
    place = rng.randrange(200, 100_000)  # in the first record, whose clips every epoch has
    target = {"flip": (str(shard), place), "truncate": (str(shard), place), "vanish": str(shard)}
    config = life.config_of(data)
    run = Life(workdir, config, sabotage=(what, rng.randrange(2, 20), target[what]))
    code = run.end()
    trial.moments.append(what)
    if code == 0 and what == "vanish":  # an open file stays readable
        trial.moments.append("not noticed, as the file was open")
        return arena.judge(trial, workdir, reference)
    trial.expect(code == 2, f"ended with {code}: {run.words[-400:]}")
    trial.expect(f"{shard}, record " in run.words, "did not name the shard and record")
    shutil.copy(arena.data / "train" / shard.name, shard)
    assert shard.stat().st_size == size
    newest = life.saved_steps(workdir)
    trial.redone = _last_step(workdir) - (newest[-1] if newest else 0)
    return arena.finish(trial, workdir, reference, config)


def skipped_record(arena: Arena, rng: random.Random) -> Trial:
    """The same with `on_bad_record="skip"`: counted, named, and the run ends."""
    trial, workdir = Trial("record spoiled, skip"), arena.workdir()
    data = arena.own_data(workdir)
    shard = data / "train" / SHARDS[0]
    config = life.config_of(data, **{"data.on_bad_record": "skip"})
    place = rng.randrange(200, 100_000)
    run = Life(workdir, config, sabotage=("flip", rng.randrange(2, 15), (str(shard), place)))
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
    trial.expect(run.words.count(f"{shard}, record 0: ") == 1, "did not name it once")
    trial.expect(life.saved_steps(workdir)[-1] == STEPS, "did not save its end")
    return trial


def loss_not_finite(arena: Arena, rng: random.Random) -> Trial:
    """A NaN: stop with the clips named and good checkpoints kept; the run then ends right."""
    trial, workdir = Trial("NaN loss, stop"), arena.workdir()
    reference, config, step = arena.reference(), arena.config(), rng.randrange(1, STEPS + 1)
    run = Life(workdir, config, sabotage=("nan", step))
    code = run.end()
    trial.expect(code == 2, f"ended with {code}: {run.words[-400:]}")
    record = workdir / "post-mortem" / f"step_{step:07d}.json"
    trial.expect(record.exists() and len(json.loads(record.read_text())["clips"]) == 2, "no record")
    saved = life.saved_steps(workdir)
    trial.expect(not saved or saved[-1] < step, "saved after the NaN")
    trial.redone = step - 1 - (saved[-1] if saved else 0)
    return arena.finish(trial, workdir, reference, config)


def loss_skipped(arena: Arena, rng: random.Random) -> Trial:
    """A NaN with `max_skipped_updates=1`, and a kill after it: as without the kill."""
    trial, workdir = Trial("NaN loss, skip"), arena.workdir()
    changes, step = {"max_skipped_updates": 1}, rng.choice((4, 9, 13, 22))
    reference = arena.reference(("nan", step), **changes)
    config = arena.config(**changes)
    run = Life(workdir, config, sabotage=("nan", step))
    run.until(lambda: _last_step(workdir) >= step)
    run.kill()
    run.wait()
    again = Life(workdir, config, sabotage=("nan", step))
    code = again.end()
    trial.expect(code == 0, f"ended with {code}: {again.words[-400:]}")
    trial.expect("was passed over" in run.words + again.words, "did not say so")
    return arena.judge(trial, workdir, reference) if code == 0 else trial


def worker_killed(arena: Arena, rng: random.Random) -> Trial:
    """A reading process is killed: others take its place, with the same batches."""
    trial, workdir = Trial("data worker killed"), arena.workdir()
    reference = arena.reference()
    config = arena.config(**{"data.num_workers": 2})
    run = Life(workdir, config, sabotage=("kill_worker", rng.randrange(1, 20)))
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
    if "has died" not in run.words:
        trial.moments.append("its batches were all there already")
    return arena.judge(trial, workdir, reference) if code == 0 else trial


def wandb_unreachable(arena: Arena, rng: random.Random) -> Trial:
    """No W&B server at the address: training goes on, and says it once."""
    trial, workdir = Trial("W&B unreachable"), arena.workdir()
    reference = arena.reference()
    environment = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{rng.randrange(1, 9)}",
        "WANDB_API_KEY": "f" * 40,
        "HOME": str(workdir.with_suffix(".home")),
    }
    config = arena.config(**{"wandb.mode": "online"})
    run = Life(workdir, config, sabotage=("nothing", 0), environment=environment)
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
    trial.expect(run.words.count("W&B failed") == 1, "did not say so once")
    trial.expect("f" * 40 not in run.words, "printed the key")
    return arena.judge(trial, workdir, reference) if code == 0 else trial


_REFUSED = {
    "seed": 1,
    "model.hidden_size": 48,
    "model.depth": 2,
    "data.stride": 4,
    "data.clip_len": 4,
    "batch_size": 5,
    "ema_decay": 0.0,
}
_ALLOWED = {"lr": 2e-3, "model.dtype": "bfloat16", "data.num_threads": 2, "log_every_steps": 5}


def wrong_resume(arena: Arena, rng: random.Random) -> Trial:
    """Other settings at a resume: refused with their names, or done and said."""
    trial, workdir = Trial("resume with other settings"), _half_done(arena, rng)
    saved = life.saved_steps(workdir)
    refused = rng.random() < 0.6
    keys = rng.sample(sorted(_REFUSED if refused else _ALLOWED), 2)
    changes = {key: (_REFUSED if refused else _ALLOWED)[key] for key in keys}
    run = Life(workdir, arena.config(**changes))
    code = run.end()
    trial.moments.append("refused" if refused else "done and said")
    trial.expect(code == (2 if refused else 0), f"{changes}: ended with {code}: {run.words[-400:]}")
    named = [key for key in keys if f"config.{key}=" in run.words or f"{key}=" in run.words]
    trial.expect(bool(named) if refused else named == keys, f"{changes}: named only {named}")
    if refused:
        trial.expect(life.saved_steps(workdir) == saved, "touched the checkpoints")
        return arena.finish(trial, workdir, arena.reference(), arena.config())
    return trial


FAULTS: dict[str, Callable[[Arena, random.Random], Trial]] = {
    f.__name__: f
    for f in (
        kill_9,
        asked_to_stop,
        asked_twice,
        damaged_checkpoint,
        half_line,
        disk_full,
        spoiled_shard,
        skipped_record,
        loss_not_finite,
        loss_skipped,
        worker_killed,
        wandb_unreachable,
        wrong_resume,
    )
}
