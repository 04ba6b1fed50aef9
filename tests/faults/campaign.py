"""The faults, each injected into its own run, which is compared with an uninterrupted run."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from cwm_jax.runtime.preemption import EXIT_CODE
from tests.faults import training_process
from tests.faults.training_process import STEPS, TrainingProcess
from tests.faults.trials import Skipped, Trial, Workspace

SHARDS = ("data_0000.array_record", "data_0001.array_record")
_CUTS = (7, 9, 11, 14)  # runs killed before these steps have two checkpoints


def kill_9(workspace: Workspace, rng: random.Random, most: float = math.inf) -> Trial:
    """SIGKILL at random moments, at most so often, until the run is finished."""
    trial, workdir = Trial("kill -9", times=0), workspace.workdir()
    reference, config = workspace.reference(), workspace.config()
    saved, reached = [], 0
    while True:
        run = TrainingProcess(workdir, config)
        in_training = rng.random() < 0.8
        if in_training:  # otherwise possibly during the start
            run.until(lambda run=run: "resuming" in run.output or _last_step(workdir) > 0)
        # Longer and longer, so that the run ends on a busy machine too.
        if trial.times < most and run.wait(rng.uniform(0, 2 + trial.times)) is None:
            run.kill()
        code = run.end()
        if saved and "resuming" in run.output:
            trial.expect(f"resuming from step {saved[-1]} " in run.output, "lost a checkpoint")
            trial.redone += max(0, reached - saved[-1])
        if code == 0:
            return workspace.judge(trial, workdir, reference)
        if code != -signal.SIGKILL:
            trial.expect(False, f"ended with {code}: {run.output[-400:]}")
            return trial
        trial.times += 1
        saved, reached = training_process.saved_steps(workdir), _last_step(workdir)
        trial.moments.append(_moment(workdir, run, saved, reached))


def _moment(workdir: Path, run: TrainingProcess, saved: list[int], reached: int) -> str:
    """What the run was doing when it was killed, from its folder."""
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


def asked_to_stop(workspace: Workspace, rng: random.Random) -> Trial:
    """SIGTERM, SIGINT or SIGHUP before random steps: exit 75, and no step is lost."""
    trial, workdir = Trial("SIGTERM, SIGINT or SIGHUP", times=0), workspace.workdir()
    reference, config = workspace.reference(), workspace.config()
    steps = sorted(rng.sample(range(1, STEPS + 1), 3))
    for step in steps:
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        run = TrainingProcess(workdir, config, injection=("signal", step, int(number)))
        code = run.end()
        trial.times += 1
        trial.expect(code == EXIT_CODE, f"ended with {code}: {run.output[-400:]}")
        trial.expect(
            training_process.saved_steps(workdir)[-1:] == [step],
            "did not save the step it finished",
        )
    return workspace.finish(trial, workdir, reference, config)


def asked_twice(workspace: Workspace, rng: random.Random) -> Trial:
    """A second signal ends the process at once, and the run resumes from its last checkpoint."""
    trial, workdir = Trial("second signal"), workspace.workdir()
    reference, config = workspace.reference(), workspace.config()
    step = rng.randrange(2, STEPS)
    run = TrainingProcess(workdir, config)
    run.until(lambda: _last_step(workdir) >= step)
    run.kill(signal.SIGTERM)
    run.until(lambda: "Send it again" in run.output)
    run.kill(signal.SIGTERM)
    code = run.wait(5)
    if code in (0, EXIT_CODE):  # it finished between the two signals
        trial.times = 0
    else:
        trial.expect(code == -signal.SIGTERM, f"ended with {code}: {run.output[-400:]}")
    if code == 0:
        return workspace.judge(trial, workdir, reference)
    return workspace.finish(trial, workdir, reference, config)


def damaged_checkpoint(workspace: Workspace, rng: random.Random) -> Trial:
    """A flipped bit, a truncated file or a missing file in the newest checkpoint."""
    trial, reference = Trial("damaged checkpoint"), workspace.reference()
    workdir = workspace.interrupted(rng.choice(_CUTS))
    *_, older, newest = training_process.saved_steps(workdir)
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
    run = TrainingProcess(workdir, workspace.config())
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
    trial.expect(f"{folder}: " in run.output, "did not name the checkpoint")
    trial.expect(f"resuming from step {older} " in run.output, "did not use the one before")
    trial.redone = newest - older
    return workspace.judge(trial, workdir, reference) if code == 0 else trial


def half_line(workspace: Workspace, rng: random.Random) -> Trial:
    """A crash while a line of metrics.jsonl was written."""
    trial, reference = Trial("metrics.jsonl cut mid-line"), workspace.reference()
    workdir = workspace.interrupted(rng.choice(_CUTS))
    path, step = workdir / "metrics.jsonl", training_process.saved_steps(workdir)[-1]
    with path.open("a") as file:
        line = json.dumps({"step": step + 1, "train/loss": 0.5})
        file.write(line[: rng.randrange(1, len(line))])
    return workspace.finish(trial, workdir, reference, workspace.config())


def disk_full(workspace: Workspace, rng: random.Random) -> Trial:
    """A full disk, for some steps or to the end: training continues, older checkpoints survive."""
    trial, disk = Trial("disk full"), workspace.workdir()
    disk.mkdir()
    mounting = ("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk))
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        raise Skipped("a tmpfs cannot be mounted here")
    try:
        return _with_a_full_disk(trial, workspace, rng, disk)
    finally:
        subprocess.run(("umount", "-l", str(disk)), check=False)


def _with_a_full_disk(trial: Trial, workspace: Workspace, rng: random.Random, disk: Path) -> Trial:
    """Half of the runs have their log on the same disk, and cannot log when it is full."""
    workdir, reference, config = disk / "run", workspace.reference(), workspace.config()
    begin = rng.randrange(2, STEPS)
    end = rng.choice((None, rng.randrange(begin + 1, STEPS + 1)))
    elsewhere = rng.random() < 0.5
    injection = "fill_disk", begin, (str(disk), end)
    logs = workspace.folder if elsewhere else disk
    run = TrainingProcess(workdir, config, injection=injection, cache=workspace.folder, logs=logs)
    code = run.end()
    trial.moments += ["full to the end" if end is None else "full for some steps"]
    trial.moments += [] if elsewhere else ["its log there too"]
    if end is not None:
        trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
        return workspace.judge(trial, workdir, reference) if code == 0 else trial
    reported = "could not be saved" in run.output or "cannot write" in run.output
    trial.expect(code == 2, f"ended with {code}: {run.output[-400:]}")
    trial.expect(reported or not elsewhere, "did not report it")
    (disk / "filler").unlink()
    trial.redone = STEPS - max(training_process.saved_steps(workdir), default=0)
    return workspace.finish(trial, workdir, reference, config, cache=workspace.folder)


def spoiled_shard(workspace: Workspace, rng: random.Random) -> Trial:
    """A shard damaged during a run: the error names it; after repair the run ends correctly."""
    what = rng.choice(("flip", "truncate", "vanish"))
    trial, reference = Trial("shard spoiled, stop"), workspace.reference()
    workdir = workspace.workdir()
    data = workspace.own_data(workdir)
    shard = data / "train" / rng.choice(SHARDS)
    size = shard.stat().st_size
    place = rng.randrange(200, 100_000)  # in the first record, which every epoch reads
    target = {"flip": (str(shard), place), "truncate": (str(shard), place), "vanish": str(shard)}
    config = training_process.config_of(data)
    run = TrainingProcess(workdir, config, injection=(what, rng.randrange(2, 10), target[what]))
    code = run.end()
    trial.moments.append(what)
    if code == 0 and what == "vanish":  # an open file stays readable
        trial.moments.append("not noticed, as the file was open")
        return workspace.judge(trial, workdir, reference)
    trial.expect(code == 2, f"ended with {code}: {run.output[-400:]}")
    trial.expect(f"{shard}, record " in run.output, "did not name the shard and record")
    shutil.copy(workspace.data / "train" / shard.name, shard)
    assert shard.stat().st_size == size
    newest = training_process.saved_steps(workdir)
    trial.redone = _last_step(workdir) - (newest[-1] if newest else 0)
    return workspace.finish(trial, workdir, reference, config)


def skipped_record(workspace: Workspace, rng: random.Random) -> Trial:
    """The same with `on_bad_record="skip"`: counted, named, and the run ends."""
    trial, workdir = Trial("record spoiled, skip"), workspace.workdir()
    data = workspace.own_data(workdir)
    shard = data / "train" / SHARDS[0]
    config = training_process.config_of(data, **{"data.on_bad_record": "skip"})
    place = rng.randrange(200, 100_000)
    run = TrainingProcess(
        workdir, config, injection=("flip", rng.randrange(2, 10), (str(shard), place))
    )
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
    trial.expect(run.output.count(f"{shard}, record 0: ") == 1, "did not name it once")
    trial.expect(training_process.saved_steps(workdir)[-1] == STEPS, "did not save its end")
    return trial


def loss_not_finite(workspace: Workspace, rng: random.Random) -> Trial:
    """A NaN: the error names the clips, checkpoints stay good, and the run then ends correctly."""
    trial, workdir = Trial("NaN loss, stop"), workspace.workdir()
    reference, config, step = workspace.reference(), workspace.config(), rng.randrange(1, STEPS + 1)
    run = TrainingProcess(workdir, config, injection=("nan", step))
    code = run.end()
    trial.expect(code == 2, f"ended with {code}: {run.output[-400:]}")
    record = workdir / "post-mortem" / f"step_{step:07d}.json"
    trial.expect(record.exists() and len(json.loads(record.read_text())["clips"]) == 2, "no record")
    saved = training_process.saved_steps(workdir)
    trial.expect(not saved or saved[-1] < step, "saved after the NaN")
    trial.redone = step - 1 - (saved[-1] if saved else 0)
    return workspace.finish(trial, workdir, reference, config)


def loss_skipped(workspace: Workspace, rng: random.Random) -> Trial:
    """A NaN with `max_skipped_updates=1`, and a kill after it: the result is as without."""
    trial, workdir = Trial("NaN loss, skip"), workspace.workdir()
    changes, step = {"optimizer.max_skipped_updates": 1}, rng.choice((4, 8, 13))
    reference = workspace.reference(("nan", step), **changes)
    config = workspace.config(**changes)
    run = TrainingProcess(workdir, config, injection=("nan", step))
    run.until(lambda: _last_step(workdir) >= step)
    run.kill()
    run.end()
    again = TrainingProcess(workdir, config, injection=("nan", step))
    code = again.end()
    trial.expect(code == 0, f"ended with {code}: {again.output[-400:]}")
    trial.expect("was skipped" in run.output + again.output, "did not report it")
    return workspace.judge(trial, workdir, reference) if code == 0 else trial


def worker_killed(workspace: Workspace, rng: random.Random) -> Trial:
    """A data worker is killed: others replace it, with the same batches."""
    trial, workdir = Trial("data worker killed"), workspace.workdir()
    reference = workspace.reference()
    config = workspace.config(**{"data.num_workers": 2})
    run = TrainingProcess(workdir, config, injection=("kill_worker", rng.randrange(1, 10)))
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
    if "has exited" not in run.output:
        trial.moments.append("its batches were complete already")
    return workspace.judge(trial, workdir, reference) if code == 0 else trial


def wandb_unreachable(workspace: Workspace, rng: random.Random) -> Trial:
    """An unreachable W&B server: training continues, and reports it once."""
    trial, workdir = Trial("W&B unreachable"), workspace.workdir()
    reference = workspace.reference()
    environment = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{rng.randrange(1, 9)}",
        "WANDB_API_KEY": "f" * 40,
        "HOME": str(workdir.with_suffix(".home")),
    }
    config = workspace.config(**{"logging.wandb.mode": "online"})
    run = TrainingProcess(workdir, config, injection=("nothing", 0), environment=environment)
    code = run.end()
    trial.expect(code == 0, f"ended with {code}: {run.output[-400:]}")
    trial.expect(run.output.count("W&B failed") == 1, "did not report it once")
    trial.expect("f" * 40 not in run.output, "printed the key")
    return workspace.judge(trial, workdir, reference) if code == 0 else trial


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


def wrong_resume(workspace: Workspace, rng: random.Random) -> Trial:
    """Changed settings on resume: refused by name, or accepted and reported."""
    trial, workdir = Trial("resume with other settings"), workspace.interrupted(rng.choice(_CUTS))
    saved = training_process.saved_steps(workdir)
    refused = rng.random() < 0.6
    keys = rng.sample(sorted(_REFUSED if refused else _ALLOWED), 2)
    changes = {key: (_REFUSED if refused else _ALLOWED)[key] for key in keys}
    run = TrainingProcess(workdir, workspace.config(**changes))
    code = run.end()
    trial.moments.append("refused" if refused else "accepted and reported")
    trial.expect(
        code == (2 if refused else 0), f"{changes}: ended with {code}: {run.output[-400:]}"
    )
    named = [key for key in keys if f"config.{key}=" in run.output or f"{key}=" in run.output]
    trial.expect(bool(named) if refused else named == keys, f"{changes}: named only {named}")
    if refused:
        trial.expect(training_process.saved_steps(workdir) == saved, "touched the checkpoints")
        return workspace.finish(trial, workdir, workspace.reference(), workspace.config())
    return trial


FAULTS: dict[str, Callable[[Workspace, random.Random], Trial]] = {
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
