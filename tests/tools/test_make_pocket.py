"""`make pocket`: a small complete run, its checks beforehand, and an interruption."""

import argparse
import json
import os
import signal
from pathlib import Path

import pytest

from cwm_jax.checkpoints import formats
from cwm_jax.errors import UserError
from cwm_jax.runtime.preemption import EXIT_CODE
from cwm_jax.tools import pocket

CPU = pocket.Device("cpu", "cpu", 0, "")
GPU = pocket.Device("gpu", "NVIDIA H100 80GB HBM3", 80 * 10**9, "9.0")
_MODEL = dict(hidden_size=16, depth=1, num_heads=1, patch_size=16, max_frames=5, history=1)
_MODEL |= dict(displacement_down=1, displacement_across=1, displacement_patch=16)
SMALL = {f"model.{name}": value for name, value in _MODEL.items()} | {"data.clip_len": 3}
SMALL |= {"validation.batches": 1, "rollouts.frames": 3, "rollouts.count": 1}
SMALL |= {"evaluation.clips": 1, "evaluation.frames": 2}
SMALL |= {"sampler.ddim_steps": 1, "optimizer.warmup_steps": 1}
SETTINGS = [f"--config.{name}={value}" for name, value in SMALL.items()]
ABSENT = "import sys\nsys.modules.update(dict.fromkeys(['av', 'wandb', 'gradio']))\n"


def flags(tmp_path, *more):
    words = ["--minutes", "5", "--frames", "40", "--data", str(tmp_path)]
    return [*words, "--workdir", str(tmp_path / "run"), *more]


def test_a_rehearsal_on_data_from_elsewhere_without_optional_packages(
    tmp_path, make_data, monkeypatch, capfd
):
    make_data(train=[[20, 20]], val=[[20]])
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "sitecustomize.py").write_text(ABSENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pocket.main(flags(tmp_path, *SETTINGS, "--config.schedule.max_steps=3"))
    printed = capfd.readouterr()
    assert "was not recorded by cwm_jax.tools.collect" in printed.err
    assert "cannot write a rollout video: videos need PyAV" in printed.err
    trained = formats.load(tmp_path / "run" / "model.safetensors")
    assert trained.step == 3
    assert trained.config["schedule"]["minutes"] == 5


@pytest.fixture
def programs(monkeypatch):
    """What would run, and with which exit code; `programs.codes` maps a word to its code."""

    class Programs(list):
        codes = {}  # noqa: RUF012

        def __call__(self, words, **_):
            self.append(words)
            return next((code for word, code in self.codes.items() if word in words), 0)

    found = Programs()
    monkeypatch.setattr(pocket, "_run", found)
    monkeypatch.setattr(pocket, "find_device", lambda: CPU)
    return found


def recorded(folder, *, train, frames):
    """As `cwm_jax.tools.collect` leaves it."""
    held = {"records": 200, "wanted": 200, "frames": 1}
    splits = {"train": dict(records=train, wanted=train, frames=frames), "val": held, "test": held}
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"recipe": {}, "splits": splits}))


def test_missing_records_are_recorded(tmp_path, programs):
    recorded(tmp_path / "data", train=300, frames=35_000)
    pocket.record(tmp_path / "data", 30_000)
    assert not programs
    pocket.record(tmp_path / "data", 40_000)
    words = " ".join(programs[0])
    assert "--train 400 --val 200 --test 200" in words


def test_without_the_game_and_data_the_alternatives_are_reported(tmp_path, programs):
    programs.codes = {"cwm_jax.tools.collect": 2}
    with pytest.raises(
        UserError, match=r"0 of 100 records.*\n?.*make install-procgen.*DATA=FOLDER"
    ):
        pocket.record(tmp_path / "data", 100)


def test_too_little_disk_or_memory_is_reported_before_recording(tmp_path, programs, monkeypatch):
    with pytest.raises(UserError, match=r"FRAMES=1000000000000 .* GB are free"):
        pocket.record(tmp_path / "data", 10**12)
    assert not programs
    pocket.check_memory(4_000_000, GPU)
    with pytest.raises(UserError, match=r"FRAMES=6000000 .* use at most FRAMES=5\d{6}$"):
        pocket.check_memory(6_000_000, GPU)
    pocket.check_memory(6_000_000, CPU)


@pytest.mark.parametrize("word", ["minutes", "frames"])
def test_zero_amounts_are_refused(tmp_path, programs, word, capsys):
    with pytest.raises(SystemExit):
        pocket.main(flags(tmp_path, f"--{word}", "0"))
    assert f"{word.upper()}=0" in capsys.readouterr().err
    assert not programs


def test_a_run_that_was_cut_off_is_exported_as_far_as_it_is(tmp_path, programs, make_data):
    make_data(train=[[20]], val=[[20]])
    programs.codes = {"cwm_jax.programs.train": EXIT_CODE}
    for saved, count in ((False, 1), (True, 2)):
        programs.clear()
        if saved:
            (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
        with pytest.raises(SystemExit) as ended:
            pocket.main(flags(tmp_path))
        assert ended.value.code == EXIT_CODE
        assert len(programs) == count
    assert "cwm_jax.tools.export" in programs[1]
    assert str(tmp_path / "run" / "model.safetensors") in programs[1]


def test_a_gpu_gets_more_clips_and_the_frames_in_its_memory():
    args = argparse.Namespace(minutes=9.0, frames=4000, data=Path("d"), workdir=Path("w"))
    on_gpu, on_cpu = (
        pocket.train_words(args, device, ["--config.optimizer.lr=1"]) for device in (GPU, CPU)
    )
    assert {"--config.data.batch_size=128", "--config.data.on_device=4000"} <= set(on_gpu)
    assert not any("batch_size" in word or "on_device" in word for word in on_cpu)
    for words in (on_gpu, on_cpu):
        assert words[-1] == "--config.optimizer.lr=1"  # the user's come last, so that they hold
        assert "--config.schedule.minutes=9.0" in words


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_forwarded_to_the_running_program(name):
    number = getattr(signal, name)
    waits = "import os, signal, sys, time\n"
    waits += f"signal.signal(signal.{name}, lambda *_: sys.exit(75))\n"
    waits += f"os.kill({os.getpid()}, signal.{name})\ntime.sleep(60)"
    before = signal.getsignal(number)
    assert pocket._run(["-c", waits]) == 75
    assert signal.getsignal(number) == before


def test_a_device_is_found_by_another_process(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(pocket, "_PROBE", 'print("noise")\nprint(\'["gpu", "G", 7, "9.0"]\')')
    assert pocket.find_device() == ("gpu", "G", 7, "9.0")
    monkeypatch.setattr(pocket, "_PROBE", "raise RuntimeError('no driver')")
    with pytest.raises(UserError, match="no device: RuntimeError: no driver"):
        pocket.find_device()
