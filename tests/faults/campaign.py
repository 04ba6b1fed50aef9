"""The faults, each tried on a run of its own and judged against an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from cwm_jax.runtime.preemption import EXIT_CODE
from tests.faults import life
from tests.faults.arena import Arena, Skipped, Trial
from tests.faults.life import STEPS, Life

SHARDS = ("data_0000.array_record", "data_0001.array_record")
_CUTS = (7, 9, 11, 14)  # steps before which runs were killed that have two checkpoints by then


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
        # Longer and longer, so that also a busy machine comes to the end.
        code = run.wait(rng.uniform(0, 2 + trial.times))
        if code is None:
            run.kill()
            code = run.end()
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
    """SIGTERM, SIGINT or SIGHUP before random steps: exit 75, and not a step lost."""
    trial, workdir = Trial("SIGTERM, SIGINT or SIGHUP", times=0), arena.workdir()
    reference, config = arena.reference(), arena.config()
    steps = sorted(rng.sample(range(1, STEPS + 1), 3))
    for step in steps:
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
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
    step = rng.randrange(2, STEPS)
    run = Life(workdir, config)
    run.until(lambda: _last_step(workdir) >= step)
    run.kill(signal.SIGTERM)
    run.until(lambda: "Once more" in run.words)
    run.kill(signal.SIGTERM)
    code = run.wait(5)
    if code in (0, EXIT_CODE):  # it came to its end between the two
        trial.times = 0
    else:
        trial.expect(code == -signal.SIGTERM, f"ended with {code}: {run.words[-400:]}")
    if code == 0:
        return arena.judge(trial, workdir, reference)
    return arena.finish(trial, workdir, reference, config)


def damaged_checkpoint(arena: Arena, rng: random.Random) -> Trial:
    """A flipped bit, a cut file or a missing file in the newest checkpoint."""
    trial, reference = Trial("damaged checkpoint"), arena.reference()
    workdir = arena.half_done(rng.choice(_CUTS))
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
    workdir = arena.half_done(rng.choice(_CUTS))
    path, step = workdir / "metrics.jsonl", life.saved_steps(workdir)[-1]
    with path.open("a") as file:
        line = json.dumps({"step": step + 1, "train/loss": 0.5})
        file.write(line[: rng.randrange(1, len(line))])
    return arena.finish(trial, workdir, reference, arena.config())


def disk_full(arena: Arena, rng: random.Random) -> Trial:
    """A full disk, for some steps or to the end: training goes on, older checkpoints stay good."""
    trial, disk = Trial("disk full"), arena.workdir()
    disk.mkdir()
    mounting = ("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk))
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        raise Skipped("a tmpfs cannot be mounted here")
    try:
        return _with_a_full_disk(trial, arena, rng, disk)
    finally:
        subprocess.run(("umount", "-l", str(disk)), check=False)


def _with_a_full_disk(trial: Trial, arena: Arena, rng: random.Random, disk: Path) -> Trial:
    """Half of the runs have their log there too, and can tell nothing once there is no room."""
    workdir, reference, config = disk / "run", arena.reference(), arena.config()
    begin = rng.randrange(2, STEPS)
    end = rng.choice((None, rng.randrange(begin + 1, STEPS + 1)))
    elsewhere = rng.random() < 0.5
    sabotage = "fill_disk", begin, (str(disk), end)
    logs = arena.folder if elsewhere else disk
    run = Life(workdir, config, sabotage=sabotage, cache=arena.folder, logs=logs)
    code = run.end()
    trial.moments += ["full to the end" if end is None else "full for some steps"]
    trial.moments += [] if elsewhere else ["its log there too"]
    if end is not None:
        trial.expect(code == 0, f"ended with {code}: {run.words[-400:]}")
        return arena.judge(trial, workdir, reference) if code == 0 else trial
    shouted = "could not be saved" in run.words or "cannot write" in run.words
    trial.expect(code == 2, f"ended with {code}: {run.words[-400:]}")
    trial.expect(shouted or not elsewhere, "said nothing of it")
    (disk / "filler").unlink()
    trial.redone = STEPS - max(life.saved_steps(workdir), default=0)
    return arena.finish(trial, workdir, reference, config, cache=arena.folder)


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
    run = Life(workdir, config, sabotage=(what, rng.randrange(2, 10), target[what]))
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
    run = Life(workdir, config, sabotage=("flip", rng.randrange(2, 10), (str(shard), place)))
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
    changes, step = {"optimizer.max_skipped_updates": 1}, rng.choice((4, 8, 13))
    reference = arena.reference(("nan", step), **changes)
    config = arena.config(**changes)
    run = Life(workdir, config, sabotage=("nan", step))
    run.until(lambda: _last_step(workdir) >= step)
    run.kill()
    run.end()
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
    run = Life(workdir, config, sabotage=("kill_worker", rng.randrange(1, 10)))
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
    "data.batch_size": 5,
    "optimizer.ema_decay": 0.0,
}
_ALLOWED = {"optimizer.lr": 2e-3, "model.dtype": "bfloat16", "data.num_threads": 2}
_ALLOWED |= {"logging.every_steps": 5}


def wrong_resume(arena: Arena, rng: random.Random) -> Trial:
    """Other settings at a resume: refused with their names, or done and said."""
    trial, workdir = Trial("resume with other settings"), arena.half_done(rng.choice(_CUTS))
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
