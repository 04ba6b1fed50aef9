"""Reports reach every sink once, in order, and only from the first process."""

import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cwm_jax.errors import echo
from cwm_jax.experiment.reporters import Reporter, Terminal, open_reporter
from cwm_jax.experiment.wandb_run import WandbConfig

OFF = WandbConfig(mode="disabled")


class Recorder:
    """A sink that records, and can fail on closing."""

    def __init__(self, closing_error=None):
        self.received, self.closed, self._closing_error = [], None, closing_error

    def scalars(self, step, values):
        self.received.append((step, dict(values)))

    def media(self, step, name, path, kind):
        self.received.append((step, name, path, kind))

    def close(self, *, failed=False):
        self.closed = failed
        if self._closing_error:
            raise self._closing_error


def test_numbers_of_any_kind_become_floats(tmp_path):
    sink = Recorder()
    with Reporter(tmp_path, [sink]) as report:
        report.scalars(3, {"a": jnp.float32(0.5), "b": np.int64(2), "c": 1})
    assert sink.received == [(3, {"a": 0.5, "b": 2.0, "c": 1.0})]
    assert all(type(value) is float for value in sink.received[0][1].values())


def test_a_name_is_reported_once_per_step_and_steps_never_decrease(tmp_path):
    sink = Recorder()
    report = Reporter(tmp_path, [sink])
    report.scalars(2, {"a": 1})
    report.scalars(2, {"a": 9, "b": 2})
    report.scalars(2, {"a": 9})
    report.video(2, "v", "video.mp4")
    report.video(2, "v", "again.mp4")
    report.scalars(3, {"a": 3})
    with pytest.raises(ValueError, match="step 2 was reported after step 3"):
        report.scalars(2, {"c": 1})
    assert [entry[:2] for entry in sink.received] == [
        (2, {"a": 1}),
        (2, {"b": 2}),
        (2, "v"),
        (3, {"a": 3}),
    ]


def test_pictures_are_written_to_the_workdir_or_reported_by_path(tmp_path):
    sink = Recorder()
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Reporter(tmp_path, [sink]) as report:
        report.image(11, "rollout/grid", picture)
        report.image(13, "rollout/grid", tmp_path / "own.png")
    (_, _, path, kind), (_, _, own, _) = sink.received
    assert np.array_equal(np.array(Image.open(path)), picture)
    assert path.is_relative_to(tmp_path)
    assert kind == "image"
    assert own == tmp_path / "own.png"


def test_every_sink_is_closed_with_the_failure_flag(tmp_path, capsys):
    sinks = [Recorder(), Recorder(closing_error=OSError("first")), Recorder()]
    Reporter(tmp_path, sinks).close()
    assert "OSError: first" in capsys.readouterr().err
    assert [sink.closed for sink in sinks] == [False] * 3

    sink = Recorder()

    def break_down():
        with Reporter(tmp_path, [sink]):
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        break_down()
    assert sink.closed is True


class Broken(Recorder):
    """A sink that always fails."""

    def scalars(self, step, values):
        raise ZeroDivisionError("odd")


def test_a_failing_sink_is_removed_and_reports_continue(tmp_path, capsys):
    sink = Recorder()
    with Reporter(tmp_path, [Broken(), sink]) as report:
        report.scalars(1, {"a": 1})
        report.scalars(2, {"a": 2})
    assert [step for step, _ in sink.received] == [1, 2]
    assert capsys.readouterr().err.count("Broken failed") == 1


def test_other_processes_print_and_write_nothing(tmp_path, capfd):
    workdir = tmp_path / "run"
    with open_reporter(workdir, total_steps=5, wandb=OFF, run_config={}, enabled=False) as report:
        report.scalars(1, {"train/loss": 1})
        report.image(1, "rollout/grid", np.zeros((2, 2, 3), np.uint8))
        report.video(1, "rollout/video", "video.mp4")
    assert not workdir.exists()
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_has_one_line_per_step(tmp_path):
    def train(first, last, resume_step):
        with open_reporter(
            tmp_path, total_steps=9, wandb=OFF, run_config={}, resume_step=resume_step
        ) as report:
            for step in range(first, last + 1):
                report.scalars(step, {"train/loss": 1 / step})

    train(1, 7, None)
    train(5, 9, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, 10))


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left():
    screen = Screen()
    terminal = Terminal(100, first_step=40, stream=screen)
    terminal._bar.start_t -= 20  # as if the 20 steps to come had taken 20 seconds
    terminal._bar.last_print_t -= 20
    terminal.scalars(60, {"train/loss": 0.12345, "train/lr": 1e-4})
    terminal._bar.refresh()
    terminal.scalars(60, {"val/loss": 0.5})
    terminal.close()
    text = screen.getvalue()
    assert "60/100" in text
    assert "loss 0.1235" in text or "loss 0.1234" in text
    assert "<00:40" in text  # time left
    assert "1.00s/step" in text
    assert "train/lr" not in text
    assert "step  60/100  val/loss 0.5\n" in text


def test_a_log_file_gets_whole_lines():
    log = io.StringIO()
    terminal = Terminal(100, stream=log)
    terminal.scalars(60, {"train/loss": 0.125, "perf/steps_per_sec": 2.0})
    terminal.scalars(60, {"val/loss": float("nan")})
    terminal.media(60, "rollout/video", "video.mp4", "video")
    terminal.close()
    assert log.getvalue().splitlines() == [
        "step  60/100  train/loss 0.125  perf/steps_per_sec 2  00:20 left",
        "step  60/100  val/loss nan",
        "step  60/100  rollout/video → video.mp4",
    ]


def test_a_log_on_a_full_disk_is_harmless(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    terminal = Terminal(10, stream=Full())
    terminal.scalars(1, {"train/loss": 0.5})
    terminal.media(1, "rollout/video", Path("video.mp4"), "video")
    monkeypatch.setattr("sys.stderr", Full())
    echo("WARNING: this cannot be written")
