"""The training program on two hosts: two processes whose working folders are their disks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from changed_config import changed
from test_sharding import free_port

from configs import debug
from cwm_jax.experiment import loop
from cwm_jax.experiment.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": dict(hidden_size=32, depth=1, num_heads=2, patch_size=16, max_frames=5),
    "data": dict(dir="data", clip_len=5, stride=3, num_workers=0, num_threads=1),
}
OFTEN = {"logging.every_steps": 1, "validation.every_steps": 2, "evaluation.every_steps": 99}
SHORT = {"validation.batches": 1, "data.global_batch_size": 6}
SHORT |= {"evaluation.clips": 1, "evaluation.frames": 6}
VIDEO = {"rollouts.frames": 6, "rollouts.count": 2}
# The likeliest displacement may change with the last digit of a sum over hosts.
SMOOTH = {"model.displacement_down": 0, "model.displacement_across": 0, "context.share": 0.0}


@pytest.fixture
def disks(tmp_path, make_data) -> list[Path]:
    """Two hosts' own disks with the same data; runs go to a third, which they share."""
    data = make_data(train=[[11, 12], [14], [13]], val=[[11, 9]])
    disks = [tmp_path / "host0", tmp_path / "host1"]
    for disk in disks:
        for split in ("train", "val"):
            shutil.copytree(data / split, disk / "data" / split)
    return disks


def settings_of(*, steps: int, fsdp: int) -> dict[str, object]:
    sizes = {f"{group}.{k}": v for group, values in SMALL.items() for k, v in values.items()}
    length = {"schedule.max_steps": steps, "compute.fsdp": fsdp}
    return sizes | OFTEN | SHORT | VIDEO | SMOOTH | length


def train_alone(workdir: Path, disk: Path, monkeypatch, *, steps: int) -> None:
    """In this process, with the same settings as `train`."""
    monkeypatch.chdir(disk)
    config = debug.get_config().to_dict()
    config = changed(config, settings_of(steps=steps, fsdp=1))
    loop.train(Settings.from_config(config), workdir, config=config)


def train(workdir: Path, disks: list[Path], *, steps: int, fsdp: int = 1) -> list[tuple[int, str]]:
    """Runs `train.py` once on each disk, together; the exit code and errors of each."""
    settings = [f"{k}={v}" for k, v in settings_of(steps=steps, fsdp=fsdp).items()]
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/debug.py"]
    command += ["--workdir", workdir, *(f"--config.{setting}" for setting in settings)]
    command += ["--launcher=flags", f"--coordinator=localhost:{free_port()}"]
    command += [f"--num_processes={len(disks)}"]
    started = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=disk,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, disk in enumerate(disks)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def measured(workdir: Path, name: str) -> dict[int, float]:
    """The values of a metric by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def test_two_hosts_train_like_one(tmp_path, disks, monkeypatch):
    """They read, train, validate and generate alike, with sharded parameters.

    Then one alone resumes from their checkpoint. An epoch has two updates.
    """
    alone, together = tmp_path / "alone", tmp_path / "together"
    train_alone(alone, disks[0], monkeypatch, steps=3)
    for code, error in train(together, disks, steps=2, fsdp=2):
        assert code == 0, error
    train_alone(together, disks[0], monkeypatch, steps=3)
    for name in ("train/loss", "val/loss", "epoch/train_loss", "epoch/psnr"):
        expected, found = measured(alone, name), measured(together, name)
        assert expected.keys() == found.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    assert measured(alone, "train/loss").keys() == {1, 2, 3}


def test_hosts_with_different_data_do_not_start(tmp_path, disks):
    """One copy lacks a shard: the same clip number would be another clip there."""
    next((disks[1] / "data" / "train").iterdir()).unlink()
    for code, error in train(tmp_path / "run", disks, steps=1):
        assert code == 2, error
        assert "all processes must have the same data.train.clips, but it is" in error
        assert "Traceback" not in error
