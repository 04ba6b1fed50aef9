"""W&B gets every number and picture, continues after a resume, and never ends a run."""

import dataclasses
import os
import struct
import sys
import time
import types

import numpy as np
import pytest
import wandb

from cwm_jax.errors import UserError
from cwm_jax.experiment import wandb_run
from cwm_jax.experiment.reporters import open_reporter
from cwm_jax.experiment.wandb_run import PROJECT, WandbConfig, open_wandb, resolved_mode
from cwm_jax.rendering import video

NUMBERS = [
    *("train/loss", "train/lr", "train/grad_norm", "val/loss"),
    *("perf/steps_per_sec", "perf/frames_per_sec"),
    *("epoch/train_loss", "epoch/val_loss", "epoch/psnr", "epoch/ssim"),
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # W&B reads its settings once
    yield
    wandb.teardown()


def mode_now():
    wandb.teardown()
    return resolved_mode("auto")


def offline_records(path):
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, records = path.read_bytes(), 7, [], []
    assert data[:4] in (b":W&B", b"")
    whole, first, middle, last = 1, 2, 3, 4
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # too little left in the block for a header
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            break  # still being written
        parts = (parts if kind in (middle, last) else []) + [data[at + 7 : at + 7 + length]]
        at += 7 + length
        assert kind in (whole, first, middle, last)
        if kind in (whole, last):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
    return records


def finished_records(path):
    """All records, once the last is there: W&B's own process still writes after `finish`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = offline_records(path)
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{path} was never finished")


def logged(workdir):
    """All history rows of a workdir's offline runs, in order: list of {name: JSON}."""
    rows = []
    for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
        for record in finished_records(path):
            if record.HasField("history"):
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): item.value_json
                        for item in record.history.item
                    }
                )
    return rows


def offline(workdir, resume_step=None):
    return open_reporter(
        workdir,
        total_steps=30,
        wandb=WandbConfig(mode="offline", project="test"),
        run_config={"model": {"dim": 32}},
        resume_step=resume_step,
    )


def test_an_offline_run_holds_everything_and_a_resumed_one_continues_it(tmp_path):
    output = tmp_path / "video.mp4"
    video.write_mp4(output, [np.zeros((16, 16, 3), np.uint8)] * 3, fps=5)
    with offline(tmp_path) as report:
        for step in (10, 20):
            report.scalars(step, dict.fromkeys(NUMBERS, step / 7))
        report.video(20, "rollout/video", output)
        report.image(20, "rollout/grid", np.zeros((5, 7, 3), np.uint8))
    run_id = (tmp_path / "wandb_run_id.txt").read_text()

    rows = logged(tmp_path)
    assert [row["_step"] for row in rows] == ["10", "20"]
    assert set(NUMBERS) <= set(rows[0])
    assert float(rows[1]["val/loss"]) == 20 / 7
    names = {name.split("/_type")[0] for name in rows[1]}
    assert {"rollout/video", "rollout/grid"} <= names
    kept = {path.suffix for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*.*")}
    assert kept == {".mp4", ".png"}

    with offline(tmp_path, resume_step=20) as report:
        report.scalars(30, {"train/loss": 0.1})
    assert (tmp_path / "wandb_run_id.txt").read_text() == run_id
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) in (1, 2)  # one if both began in the same second
    assert all(run_id.strip() in folder.name for folder in folders)

    with offline(tmp_path):
        pass
    assert (tmp_path / "wandb_run_id.txt").read_text() != run_id


def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch):
    assert mode_now() == "disabled"
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine example.org login user password secret\n")
    assert mode_now() == "disabled"
    netrc.write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    assert mode_now() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example.org:8080")
    assert mode_now() == "disabled"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode_now() == "online"
    assert [resolved_mode(mode) for mode in ("online", "disabled")] == ["online", "disabled"]


@pytest.mark.parametrize(
    ("setting", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
@pytest.mark.parametrize("place", ["WANDB_MODE", "the folder", "the user", "WANDB_CONFIG_DIR"])
def test_wandbs_own_mode_takes_precedence_over_a_key(tmp_path, monkeypatch, setting, mode, place):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    folders = {"the folder": tmp_path / "wandb", "WANDB_CONFIG_DIR": tmp_path / "config"}
    folder = folders.get(place, tmp_path / "home" / ".config" / "wandb")
    if place == "WANDB_MODE":
        monkeypatch.setenv(place, setting)
    else:
        folder.mkdir(parents=True)
        (folder / "settings").write_text(f"[default]\nmode = {setting}\n")
    if place == "WANDB_CONFIG_DIR":
        monkeypatch.setenv(place, str(folder))
    assert mode_now() == mode


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "ofline"), ("WANDB_API_KEY", "short")])
def test_invalid_wandb_settings_disable_it(monkeypatch, capsys, name, value):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv(name, value)
    assert mode_now() == "disabled"
    assert "kept on this machine" in capsys.readouterr().err


def test_without_a_home_folder_wandb_is_disabled(tmp_path, monkeypatch, capsys):
    def no_such_user(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    wandb.teardown()
    assert open_wandb(WandbConfig(), tmp_path, run_config={}, resuming=False) is None
    assert "kept on this machine" in capsys.readouterr().err


def test_other_settings_of_wandb_take_precedence(tmp_path, monkeypatch):
    given = {}

    def init(**more):
        given.update(more)
        return types.SimpleNamespace(step=0)

    monkeypatch.setattr(wandb, "init", init)
    offline = WandbConfig(mode="offline")
    start = lambda config: open_wandb(config, tmp_path, run_config={}, resuming=False)
    start(offline)
    assert (given["project"], given["dir"], given["resume"]) == (PROJECT, tmp_path, "allow")
    wishes = {"PROJECT": "mine", "DIR": str(tmp_path / "w"), "RUN_ID": "abc", "RESUME": "must"}
    for name, value in {**wishes, "INIT_TIMEOUT": "7"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    start(offline)
    assert (given["project"], given["dir"], given["resume"]) == ("mine", None, "must")
    assert given["id"] == "abc"
    assert "init_timeout" not in given["settings"].model_fields_set
    start(dataclasses.replace(offline, project="other"))
    assert given["project"] == "other"


def test_a_run_id_that_cannot_be_written_is_reported_and_training_continues(tmp_path, capsys):
    (tmp_path / wandb_run.RUN_ID_FILE).mkdir()
    config = WandbConfig(mode="offline")
    assert open_wandb(config, tmp_path, run_config={}, resuming=False) is None
    assert "WARNING: W&B failed" in capsys.readouterr().err


def test_disabled_does_not_even_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    config = WandbConfig(mode="disabled")
    assert open_wandb(config, tmp_path, run_config={}, resuming=False) is None
    assert not list(tmp_path.iterdir())


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match=r"wandb.mode must be one of .*offline.*not 'on'"):
        WandbConfig(mode="on")


def test_an_unreachable_server_is_reported_and_training_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb_run, "_INIT_SECONDS", 1)
    config = WandbConfig(mode="online")
    with open_reporter(tmp_path, total_steps=3, wandb=config, run_config={}) as report:
        report.scalars(1, {"train/loss": 1.0})
    assert "WARNING: W&B failed" in capsys.readouterr().err
    assert "train/loss" in (tmp_path / "metrics.jsonl").read_text()


class Breaking(types.SimpleNamespace):
    """A run that resumes from step 5 and whose connection fails at step 7."""

    step = 5

    def log(self, values, step):
        if step == 7:
            raise ConnectionError("gone")
        self.sent.append(step)

    def finish(self, exit_code):
        self.sent.append("finish")


def test_a_later_failure_is_reported_once_and_known_steps_are_skipped(capsys):
    run = Breaking(sent=[])
    sink = wandb_run.WandbRun(run)
    for step in range(3, 10):
        sink.scalars(step, {"train/loss": 1.0})
    sink.close()
    assert run.sent == [5, 6]
    errors = capsys.readouterr().err
    assert errors.count("WARNING") == 1
    assert "ConnectionError: gone" in errors
