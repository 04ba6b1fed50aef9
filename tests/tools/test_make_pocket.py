"""`make pocket`: a small complete run, its checks beforehand, and an interruption."""

import argparse
import signal
from pathlib import Path

import pytest

from configs import pocket as config
from cwm_jax.checkpoints import formats
from cwm_jax.errors import UserError
from cwm_jax.experiment import card_measurement
from cwm_jax.runtime import device_query, subprograms
from cwm_jax.runtime.device_query import Device
from cwm_jax.runtime.preemption import EXIT_CODE
from cwm_jax.tools import pocket

CPU = Device("cpu", "cpu", 0, "")
GPU = Device("gpu", "NVIDIA H100 80GB HBM3", 80 * 10**9, "9.0")
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
    """Trains, exports, measures and writes the card, in seconds."""
    make_data(train=[[40, 40]], val=[[40]], test=[[40, 40]])
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "sitecustomize.py").write_text(ABSENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without weights of LPIPS
    short = {"clips": 2, "horizon": 4, "drift-frames": 16}
    monkeypatch.setattr(card_measurement, "ON_CPU", short)
    monkeypatch.setattr(card_measurement, "STEPS", (1,))
    pocket.main(flags(tmp_path, *SETTINGS, "--config.schedule.max_steps=3"))
    printed = capfd.readouterr()
    assert "was not recorded by cwm_jax.tools.collect" in printed.err
    assert "cannot write a rollout video: videos need PyAV" in printed.err
    trained = formats.load(tmp_path / "run" / "model.safetensors")
    assert trained.step == 3
    assert trained.config["schedule"]["minutes"] == 5
    card = (tmp_path / "run" / "card.md").read_text()
    assert "| updates | 3 |" in card
    assert "| training frames | 36 (4 clips of 3 an update) |" in card
    assert "| | floor | S = 1 |" in card
    for row in ("PSNR, dB, at frame 2", "sharpness of the first and last 16", "jump, as readable"):
        assert f"| {row}" in card
    assert "LPIPS was not measured: its weights are absent" in card


@pytest.fixture
def programs(monkeypatch):
    """What would run, and with which exit code; `programs.codes` maps a word to its code."""

    class Programs(list):
        codes = {}  # noqa: RUF012

        def __call__(self, words, **_):
            self.append(words)
            return next((code for word, code in self.codes.items() if word in words), 0)

    found = Programs()
    monkeypatch.setattr(subprograms, "run", found)
    monkeypatch.setattr(device_query, "find", lambda: CPU)
    return found


@pytest.mark.parametrize("word", ["minutes", "frames"])
def test_zero_amounts_are_refused(tmp_path, programs, word, capsys):
    with pytest.raises(SystemExit):
        pocket.main(flags(tmp_path, f"--{word}", "0"))
    assert f"{word.upper()}=0" in capsys.readouterr().err
    assert not programs


def test_a_run_that_was_cut_off_is_exported_as_far_as_it_is(tmp_path, programs, make_data):
    make_data(train=[[20]], val=[[20]])
    programs.codes = {"cwm_jax.programs.train": EXIT_CODE}
    for saved, count in ((False, 1), (True, 2)):  # train.py, and then the export
        programs.clear()
        if saved:
            (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
        with pytest.raises(SystemExit) as ended:
            pocket.main(flags(tmp_path))
        assert ended.value.code == EXIT_CODE
        assert len(programs) == count
    assert "cwm_jax.tools.export" in programs[1]
    assert str(tmp_path / "run" / "model.safetensors") in programs[1]


def test_a_killed_training_leaves_a_model_and_its_status(tmp_path, programs):
    programs.codes = {"cwm_jax.programs.train": -signal.SIGKILL}
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        pocket.main(flags(tmp_path))
    assert ended.value.code == 128 + signal.SIGKILL
    assert "cwm_jax.tools.export" in programs[-1]
    programs.clear()
    pocket.main(flags(tmp_path, "--export-only"))
    assert [words[1] for words in programs] == ["cwm_jax.tools.export"]


def test_without_a_checkpoint_there_is_nothing_to_export(tmp_path, programs, capsys):
    with pytest.raises(SystemExit):
        pocket.main(flags(tmp_path, "--export-only"))
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert not programs


def test_checkpoints_are_exported_during_training_each_time_the_step_doubles(tmp_path, monkeypatch):
    args = argparse.Namespace(workdir=tmp_path, output=tmp_path / "model.safetensors")
    writes = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    saved = lambda: max(pocket.saved(tmp_path))
    words = lambda args: ["-c", writes, str(args.output), f"{saved()} "]
    monkeypatch.setattr(pocket, "export_words", words)
    early = pocket.EarlyExports(args)
    for step in (100, 150, 199, 210, 410, 430):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        early()
        early.close()
    assert args.output.read_text() == "100 210 430 "


def test_minutes_that_are_over_before_the_first_save_are_named(tmp_path, programs, capsys):
    pocket.main(["--minutes", "2", *flags(tmp_path)[2:]])
    assert "MINUTES=2 are over before the first save" in capsys.readouterr().err
    often = "--config.checkpoints.every_minutes=1"
    pocket.main(["--minutes", "2", *flags(tmp_path)[2:], often])
    assert "before the first save" not in capsys.readouterr().err
    assert config.get_config().checkpoints.every_minutes == pocket.SAVE_MINUTES


def test_too_little_memory_is_reported():
    pocket.check_memory(4_000_000, GPU)
    with pytest.raises(UserError, match=r"FRAMES=6000000 .* use at most FRAMES=5\d{6}$"):
        pocket.check_memory(6_000_000, GPU)
    pocket.check_memory(6_000_000, CPU)


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
