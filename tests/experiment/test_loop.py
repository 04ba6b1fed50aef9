"""Training on a small scale: train, log, save, resume, and the programs around it."""

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from changed_config import changed
from forked_programs import run_each
from tiny_network import TINY

from configs import base
from cwm_jax.checkpoints import run_checkpoint, weights
from cwm_jax.data import loader
from cwm_jax.errors import UserError
from cwm_jax.evaluation import lpips, lpips_weights, quick, single_step
from cwm_jax.experiment import clock, loop, measurements, metrics_file, run_directory
from cwm_jax.experiment.settings import Settings
from cwm_jax.programs import sample
from cwm_jax.rendering import plots
from cwm_jax.rendering.video import read_mp4
from cwm_jax.runtime import preemption
from cwm_jax.sampling import rollouts
from cwm_jax.training import train_step
from cwm_jax.training.train_step import TrainState

ROOT = Path(__file__).parents[2]


def config_of(data_dir, settings=None):
    """A short run, without rollouts and their scores; `WATCHED` has them."""
    sizes = ("hidden_size", "num_heads", "patch_size", "max_frames", "dtype")
    short = {f"model.{name}": getattr(TINY, name) for name in sizes} | {
        "model.depth": 1,
        "data.dir": str(data_dir),
        "data.clip_len": 5,
        "data.stride": 3,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.num_threads": 1,
        "schedule.epochs": 2,
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": 3,
        "optimizer.ema_decay": 0.9,
        "logging.every_steps": 2,
        "logging.wandb.mode": "disabled",
        "validation.every_steps": 3,
        "validation.batches": 1,
        "evaluation.every_steps": 0,
        "evaluation.clips": 2,
        "evaluation.frames": 6,
        "rollouts.every_steps": 0,
        "rollouts.frames": 7,
        "rollouts.count": 2,
        "checkpoints.every_steps": 3,
        "sampler.ddim_steps": 2,
    }
    return changed(base.get_config().to_dict(), short | (settings or {}))


WATCHED = {"evaluation.every_steps": 4, "rollouts.every_steps": 4}


def train(workdir, config):
    return loop.train(Settings.from_config(config), workdir, config=config)


@pytest.fixture(scope="module")
def small_data(write_data, tmp_path_factory):
    """3 + 3 + 4 = 10 clips: 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, train=[[11, 12], [14]], val=[[11, 9]])


class Run(NamedTuple):
    """A run of two epochs, for tests that read it; `copy` is for those that continue it."""

    workdir: Path
    state: TrainState

    def copy(self, workdir: Path) -> Path:
        return shutil.copytree(self.workdir, workdir)


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """With everything that a run does beside its updates."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ones = {name: np.ones(shape, np.float32) for name, shape in lpips.shapes().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips_weights, "available", lambda: lpips.from_arrays(ones))
        return Run(run, train(run, config_of(small_data, WATCHED)))


@pytest.fixture
def plain_curves(monkeypatch, whole):
    """Takes away the plots of all runs but `whole`."""
    monkeypatch.setattr(plots, "curves", lambda *_: None)


pytestmark = pytest.mark.usefixtures("plain_curves")


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_all_its_files(whole):
    run = whole.workdir
    assert int(whole.state.step) == 10
    seen = {}
    for line in lines_of(run):
        for name in line:
            seen.setdefault(name, []).append(line["step"])
    assert seen["train/loss"] == seen["train/lr"] == seen["train/grad_norm"] == [2, 4, 6, 8, 10]
    assert seen["val/loss"] == [3, 6, 9]
    for name in ("psnr", "ssim", "psnr_motion", "lpips", "delta_psnr", "copy_last_psnr"):
        assert seen[f"eval/{name}"] == [4, 8]
    assert seen["rollout/video"] == seen["rollout/grid"] == [4, 8, 10]
    for name in ("epoch/train_loss", "epoch/val_loss", "epoch/psnr", "epoch/ssim"):
        assert seen[name] == [5, 10]
    assert {"perf/steps_per_sec", "perf/frames_per_sec"} <= set(seen)
    frames = read_mp4(run / "rollouts" / "rollout_0000010.mp4")
    assert len(frames) == 7
    assert (run / "curves.png").stat().st_size > 1000
    assert run_checkpoint.load(run).step == 10


def test_training_resumes_from_an_import_with_an_incomplete_config(tmp_path, small_data, whole):
    """A PyTorch checkpoint has neither the stride of its clips nor the seed."""
    config = config_of(small_data, {"schedule.epochs": 3, "schedule.max_steps": 11})
    imported, known = tmp_path, {name: config[name] for name in ("model", "optimizer")}
    with run_checkpoint.Checkpoints(imported, retention=run_checkpoint.Retention(1)) as saved:
        saved.save(whole.state, data_position="", config=known)
    assert int(train(imported, config).step) == 11
    config["model"]["depth"] += 1
    with pytest.raises(UserError, match=r"config.model.depth=\d, was"):
        train(imported, config)


def test_two_runs_do_not_share_a_workdir(tmp_path, small_data, monkeypatch):
    monkeypatch.setattr(run_directory, "LEAVING_SECONDS", 0.1)
    run = tmp_path / "run"
    run.mkdir()
    with (
        run_directory.held(run),
        pytest.raises(UserError, match=f"another run has been using {run}"),
    ):
        train(run, config_of(small_data, {"schedule.max_steps": 1}))
    assert not (run / "checkpoints").exists()
    train(run, config_of(small_data, {"schedule.max_steps": 1}))  # the first has ended


def before_step(monkeypatch, step, action):
    """Calls `action(batch)` before that update; its result replaces the batch."""
    undisturbed = train_step.train_step

    def disturbed(state, batch, key, *setup, **options):
        if int(state.step) + 1 == step:
            batch = action(batch) or batch
        return undisturbed(state, batch, key, *setup, **options)

    monkeypatch.setattr(train_step, "train_step", disturbed)


def stopped_before(workdir, config, monkeypatch, step):
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(preemption.Preempted, match=f"stopped by SIGTERM after step {step} of"):
            train(workdir, config)
    assert run_checkpoint.load(workdir).step == step


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path, small_data, whole, monkeypatch
):
    """By a signal or by fewer steps; a stopped run saves its step and loses nothing."""
    config, cut = config_of(small_data), tmp_path / "cut"
    stopped_before(cut, config, monkeypatch, 1)  # before anything was saved
    train(cut, changed(config, {"schedule.max_steps": 4}))  # within an epoch
    stopped_before(cut, config, monkeypatch, 5)  # at an epoch's end, whose validation is postponed
    names = {name for line in lines_of(cut) if line["step"] == 5 for name in line}
    assert "epoch/val_loss" not in names
    resumed = train(cut, config)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), whole.state, resumed)
    assert jax.tree.all(same)

    def values(workdir):
        return [
            (line["step"], name, value)
            for line in lines_of(workdir)
            for name, value in line.items()
            if name.split("/")[0] in ("train", "val", "epoch")
        ]

    assert values(cut) == values(whole.workdir)


def poisoned(batch):
    return batch | {"frames": jax.numpy.full(batch["frames"].shape, jax.numpy.nan)}


def test_a_nan_loss_stops_the_run_and_is_never_saved(tmp_path, small_data, monkeypatch, capsys):
    short = {"checkpoints.every_steps": 1, "schedule.max_steps": 4, "validation.every_steps": 0}
    config = config_of(small_data, short)
    with monkeypatch.context() as patch:
        before_step(patch, 3, poisoned)
        with pytest.raises(UserError, match=r"step 3 has loss nan.*\n.*max_skipped_updates=0"):
            train(tmp_path / "run", config)
    assert run_checkpoint.load(tmp_path / "run").step == 2
    record = json.loads((tmp_path / "run" / "post-mortem" / "step_0000003.json").read_text())
    batches = loader.train_batches(Settings.from_config(config).data, batch_size=2, seed=0)
    assert record["clips"] == batches.origins(2)
    with monkeypatch.context() as patch:
        before_step(patch, 3, poisoned)
        config = config_of(small_data, short | {"optimizer.max_skipped_updates": 1})
        config["model"] |= {"attention": "xla", "norm": "xla"}  # as the message suggests
        state = train(tmp_path / "run", config)
    assert "config.model.attention='xla', was 'auto'" in capsys.readouterr().out
    assert int(state.skipped) == 1
    assert all(bool(jax.numpy.isfinite(p).all()) for p in state.params.values())


def test_changed_settings_are_refused_by_name_or_reported(tmp_path, small_data, whole, capsys):
    run = whole.copy(tmp_path / "run")
    kept = (run / "config.json").read_text()
    other = config_of(small_data, {"seed": 1, "optimizer.ema_decay": 0.0, "model.depth": 2})
    with pytest.raises(UserError) as raised:
        train(run, other)
    for name in ("seed", "optimizer.ema_decay", "model.depth"):
        assert f"config.{name}=" in str(raised.value)
    with pytest.raises(UserError, match=r"batch_size=2, this run has batch_size=5.*global_batch"):
        train(run, config_of(small_data, {"data.batch_size": 5}))
    assert (run / "config.json").read_text() == kept
    longer = {"schedule.epochs": 3, "schedule.max_steps": 11, "optimizer.lr": 2e-3}
    assert int(train(run, config_of(small_data, longer)).step) == 11
    assert "config.optimizer.lr=0.002, was 0.001" in capsys.readouterr().out


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_starts_from_another_runs_parameters(tmp_path, small_data, whole, exported):
    source = tmp_path / f"model{weights.SUFFIX}"
    if exported:
        trained = run_checkpoint.load(whole.workdir)
        weights.write(source, trained.params, dict(step=trained.step, config=trained.config))
    else:
        source = whole.copy(tmp_path / "first")
    config = config_of(
        small_data, {"init_from": str(source), "optimizer.lr": 0.0, "schedule.max_steps": 1}
    )
    config["model"]["max_frames"] = 8
    second = train(tmp_path / "second", config)
    assert int(second.step) == 1
    for name, average in whole.state.ema.items():
        # What a run samples from; a rate of 0 leaves it unchanged.
        np.testing.assert_array_equal(second.params[name], average)
        np.testing.assert_allclose(second.ema[name], average, atol=1e-6)
    if exported:
        return
    shutil.rmtree(source)  # not needed after the start
    longer = changed(config, {"schedule.max_steps": 2})
    assert int(train(tmp_path / "second", longer).step) == 2
    with pytest.raises(UserError, match=r"another run:\n  config\.init_from='', was "):
        train(tmp_path / "second", changed(longer, {"init_from": ""}))


def test_a_student_is_distilled_and_resumes(tmp_path, small_data, whole, capsys):
    """The loss is relative to the teacher: near 0 where the student is the teacher."""
    teacher = str(whole.workdir)
    config = config_of(
        small_data, {"init_from": teacher, "distil_from": teacher, "schedule.max_steps": 2}
    )
    config["sampler"]["ddim_steps"] = 50  # short steps, which nearly equal two half steps
    train(tmp_path / "student", config)
    assert f"distilling {teacher} to half of its denoising steps" in capsys.readouterr().out
    series = metrics_file.read_series(tmp_path / "student" / "metrics.jsonl")
    assert series["train/loss"][1][0] < 1e-3
    assert int(train(tmp_path / "student", changed(config, {"schedule.max_steps": 3})).step) == 3
    with pytest.raises(UserError, match=r"config\.distil_from: no checkpoint folder at .*nowhere"):
        train(tmp_path / "student", config | dict(distil_from=str(tmp_path / "nowhere")))
    config["model"]["depth"] = 2
    config["init_from"] = ""
    with pytest.raises(UserError, match=r"config\.distil_from=.*depth=1, not 2"):
        train(tmp_path / "other", config)


def test_a_network_that_predicts_clean_samples_is_saved_and_resumes_as_such(tmp_path, small_data):
    settings = WATCHED | {"model.prediction": "clean", "loss.weighting": "ramp"}
    config = config_of(small_data, settings | {"schedule.max_steps": 4})
    train(tmp_path / "run", config)
    assert run_checkpoint.load(tmp_path / "run").network.prediction == "clean"
    assert {"val/loss", "eval/psnr"} <= set().union(*lines_of(tmp_path / "run"))
    assert int(train(tmp_path / "run", changed(config, {"schedule.max_steps": 5})).step) == 5
    with pytest.raises(UserError, match=r"config\.model\.prediction='velocity', was 'clean'"):
        train(tmp_path / "run", changed(config, {"model.prediction": "velocity"}))


def test_a_run_refuses_parameters_of_another_network(tmp_path, small_data, whole):
    config = config_of(small_data, {"init_from": str(whole.workdir), "model.depth": 2})
    with pytest.raises(UserError, match=r"config\.init_from=.*depth=1, not 2"):
        train(tmp_path / "second", config)
    config["init_from"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.init_from: no checkpoint folder at .*nothing"):
        train(tmp_path / "second", config)
    assert not (tmp_path / "second" / "config.json").exists()


@pytest.mark.parametrize("what", ["sampler", "rest"])
def test_failures_of_optional_work_never_end_training(
    tmp_path, small_data, monkeypatch, capsys, what
):
    def failing(*_, **__):
        raise ZeroDivisionError("odd")

    places = [(measurements, "Sampler")]
    if what == "rest":
        places = [(quick, "run"), (rollouts, "write"), (plots, "curves")]
        places += [(single_step, name) for name in ("validation", "epoch_end")]
    for module, name in places:
        monkeypatch.setattr(module, name, failing)
    config = config_of(small_data, WATCHED | {"schedule.max_steps": 5})
    assert int(train(tmp_path / "run", config).step) == 5
    assert run_checkpoint.load(tmp_path / "run").step == 5
    message = capsys.readouterr().err
    names = ["score", "write a rollout video", "plot curves", "validate", "measure the epoch"]
    for name in ["prepare rollouts"] if what == "sampler" else names:
        assert f"cannot {name}" in message


def test_a_finished_run_is_unchanged_by_another_start(tmp_path, small_data, whole):
    run = whole.copy(tmp_path / "run")
    again = train(run, config_of(small_data, WATCHED))
    assert int(again.step) == int(whole.state.step) == 10
    assert lines_of(run) == lines_of(whole.workdir)


def test_mistakes_are_reported_at_the_start(tmp_path, small_data):
    for changes, message in (
        ({"data.batch_size": 20}, "only 10 clips"),
        (WATCHED | {"rollouts.frames": 12}, r"the longest episode .*config\.rollouts\.frames=12"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", config_of(small_data, changes))
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_named(tmp_path, small_data):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/run"):
        train(tmp_path / "file" / "run", config_of(small_data))


def test_links_out_of_the_workdir_are_refused(tmp_path, small_data):
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    for name in ("metrics.jsonl", "checkpoints", "rollouts/rollout_0000004.mp4"):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).symlink_to(outside / "x")
        with pytest.raises(UserError, match=f"{name} is a link"):
            train(workdir, config_of(small_data))
        (workdir / name).unlink()
    assert not list(outside.iterdir())


def program(*words, cwd=ROOT, devices=1):
    flag = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {flag}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


DEBUG = ["--config", "configs/debug.py", "--workdir", "W"]


MISTAKES = (
    (["--config", "configs/small.py"], "set the run's folder: --workdir=runs/NAME"),
    (
        ["--config", "configs/none.py", "--workdir", "W"],
        "--config configs/none.py: there is no such file",
    ),
    ([*DEBUG, "--config.seeed=1"], "there is no setting config.seeed (did you mean seed?); see"),
    ([*DEBUG, "--config.data.d=1"], "there is no setting config.data.d; see docs/settings.md"),
    (
        [*DEBUG, "--config.optimizer.lr=fast"],
        "flag --config.optimizer.lr=fast: could not convert string to float",
    ),
    (
        [*DEBUG, "config.optimizer.lr=0.5"],
        "error: config.optimizer.lr=0.5 is no flag (did you mean --config.optimizer.lr=0.5?)",
    ),
    ([*DEBUG, "stray"], "error: stray is no flag"),
    (
        ["--config", "C", "--workdir", "W"],
        "error: Could not override field 'depth' (reference). 2 is of original type",
    ),
    ([*DEBUG, "--config.data.dir=no"], "error: The data folder no does not exist."),
    (
        [*DEBUG, "--config.data.global_batch_size=3"],
        "error: config.data.global_batch_size=3 cannot be split over 2 devices",
    ),
)


def test_the_training_program_reports_mistakes_without_a_traceback(tmp_path):
    wrong = "def get_config():\n c = debug.get_config()\n c.model.depth = '2'\n return c\n"
    config = tmp_path / "wrong_type.py"
    config.write_text(f"from configs import debug\n{wrong}")
    places = {"W": str(tmp_path), "C": str(config)}
    words_of = lambda words: [places.get(word, word) for word in words]
    commands = [["cwm_jax.programs.train", *words_of(words)] for words, _ in MISTAKES]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    results = run_each(commands, tmp_path, XLA_FLAGS=flags)
    for (words, message), result in zip(MISTAKES, results, strict=True):
        assert result.returncode not in (0, None), words
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_the_sampling_program(tmp_path, whole):
    whole.copy(tmp_path / "run")
    words = "--frames 8 --n-samples 2 --n-prompt 2 --noise-levels 999,400 --action-source pattern"
    result = program(
        *[str(ROOT / "sample.py"), "--checkpoint", "run", *words.split(), "--pattern", "7,8"],
        *["--output", "out.mp4", "--grid", "out.png", "--save-npz", "out.npz", "--seed", "3"],
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "frames/s" in result.stdout or "including compilation" in result.stdout
    assert len(read_mp4(tmp_path / "out.mp4")) == 8
    with np.load(tmp_path / "out.npz") as raw:
        assert raw["frames"].shape == (2, 8, 64, 64, 3)
        assert raw["actions"][:, 2:].tolist() == [[7, 8] * 3] * 2
        assert raw["actions"][:, 0].tolist() == [-1, -1]
        np.testing.assert_array_equal(raw["frames"][:, :2], raw["real"][:, :2])


def test_the_sampling_program_reports_mistakes(tmp_path, whole, monkeypatch, capsys):
    whole.copy(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ("--checkpoint nowhere", "nowhere"),
        ("--checkpoint run --frames 300", "300 frames"),
        ("--checkpoint run --frames 1", "1 frames"),
        ("--checkpoint run --n-samples 2 --frames 5 --ddim-steps 0", "ddim_steps"),
        ("--checkpoint run --n-samples 2 --frames 5 --noise-levels 5,5", "(5, 5)"),
        ("--checkpoint run --n-samples 2 --frames 5 --noise-levels 1000,3", "not 1000"),
        ("--checkpoint run --n-samples 2 --frames 5 --noise-levels a", "--noise-levels a"),
        ("--checkpoint run --frames 5 --n-samples 2 --data nodata", "nodata"),
        ("--checkpoint run --n-samples 2 --action-source pattern", "--pattern"),
        ("--checkpoint run --n-samples 2 --action-source pattern --pattern 15", "15"),
        ("--checkpoint run --n-samples 2 --action-source pattern --pattern a", "--pattern a"),
        ("--checkpoint run --n-samples 2 --n-prompt 6 --frames 9", "6 prompt frames"),
        ("--checkpoint run --n-samples 2 --frames 9 --step 7", "step 7"),
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            sample.main()
        assert stopped.value.code == 2, words
        assert message in capsys.readouterr().err, words


def ticking(monkeypatch, seconds):
    """Advances a run's clock by so many seconds whenever it is read."""
    ticks = itertools.count(0, seconds)
    now = functools.partial(clock.Clock, now=lambda: next(ticks))
    monkeypatch.setattr(clock, "Clock", now)


def test_a_run_ends_with_its_minutes_and_resumes_with_its_clock(tmp_path, small_data, monkeypatch):
    ticking(monkeypatch, seconds=3)
    config = config_of(
        small_data,
        {
            "schedule.minutes": 4.0,
            "schedule.epochs": 100,
            "schedule.decay_share": 0.5,
            "logging.every_steps": 1,
            "validation.every_steps": 0,
        },
    )
    saves = {"checkpoints.every_minutes": 1.0, "checkpoints.every_steps": 1000}
    config = changed(config, saves | {"checkpoints.keep": 9})
    run = tmp_path / "run"
    train(run, changed(config, {"schedule.max_steps": 4}))
    stopped = run_checkpoint.Checkpoints(run, retention=run_checkpoint.Retention(9)).newest()
    assert 20 < stopped.seconds < 180
    state = train(run, config)
    series = metrics_file.read_series(run / "metrics.jsonl")
    steps, minutes = (values.tolist() for values in series["train/minutes"])
    assert steps == list(range(1, int(state.step) + 1))
    assert minutes == sorted(minutes)
    assert 4 <= minutes[-1] < 4.5
    rates = series["train/lr"][1].tolist()
    highest = max(range(len(rates)), key=rates.__getitem__)
    assert rates[highest] == pytest.approx(1e-3)
    assert 0 <= rates[-1] < 1e-4
    saves = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert len(saves) >= 4  # about one per minute
    assert "rollout/video" not in {name for line in lines_of(run) for name in line}
    assert int(train(run, config).step) == int(state.step)  # it is finished and stays so


def test_minutes_that_end_with_the_first_update_are_reported(tmp_path, small_data, monkeypatch):
    ticking(monkeypatch, seconds=3)
    with pytest.raises(UserError, match=r"minutes=0\.01 ended with the first update"):
        train(tmp_path / "run", config_of(small_data, {"schedule.minutes": 0.01}))


def test_stages_and_data_on_the_device_change_no_other_update(tmp_path, small_data):
    short = {"schedule.max_steps": 4, "logging.every_steps": 1, "validation.every_steps": 0}
    config = config_of(small_data, short)
    train(tmp_path / "plain", config)
    config["data"]["on_device"] = 1000
    config["schedule"]["stages"] = ((0.5, {"noise_levels.top_share": 1.0}),)
    train(tmp_path / "staged", config)
    plain, staged = (
        metrics_file.read_series(tmp_path / name / "metrics.jsonl")["train/loss"][1].tolist()
        for name in ("plain", "staged")
    )
    assert staged[:2] == plain[:2]
    assert staged[2] != plain[2]
    train(tmp_path / "staged", changed(config, {"schedule.max_steps": 5}))


def test_frames_that_leave_too_little_memory_are_named(tmp_path, small_data, monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    config = config_of(small_data)
    with monkeypatch.context() as patch:
        before_step(patch, 1, fail)
        with pytest.raises(UserError, match=r"memory is exhausted: --dry-run reports what fits"):
            train(tmp_path / "run", config)
        config["data"]["on_device"] = 50
        with pytest.raises(UserError, match=r"config\.data\.on_device=50 leaves too little"):
            train(tmp_path / "run", config)
