"""What TensorBoard reads from a run's event files: the keys, images and videos of the run."""

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cwm_jax.experiment import tensorboard_run
from cwm_jax.experiment.reporters import open_reporter
from cwm_jax.experiment.wandb_run import WandbConfig
from cwm_jax.rendering import video


def reporter(workdir, **more):
    off = WandbConfig(mode="disabled")
    config = {"seed": 3, "model": {"depth": 2}}
    return open_reporter(
        workdir, total_steps=9, wandb=off, run_config=config, tensorboard=True, **more
    )


def read(workdir):
    events = EventAccumulator(str(workdir / tensorboard_run.FOLDER))
    events.Reload()
    return events


@pytest.fixture
def rollout_mp4(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    video.write_mp4(tmp_path / "video.mp4", frames, fps=15)
    return tmp_path / "video.mp4"


def test_numbers_pictures_and_videos_are_under_the_keys_of_the_run(tmp_path, rollout_mp4):
    picture = np.random.default_rng(1).integers(0, 256, (7, 9, 3), np.uint8)
    with reporter(tmp_path) as report:
        report.scalars(1, {"train/loss": 0.5})
        report.scalars(2, {"train/loss": 0.25, "val/loss": 1.0})
        report.image(2, "rollout/grid", picture)
        report.video(2, "rollout/video", rollout_mp4)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(2, 1.0)]
    assert (
        '"depth": 2' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    (grid,), (shown,) = events.Images("rollout/grid"), events.Images("rollout/video")
    held = Image.open(io.BytesIO(grid.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(held), picture)
    moving = Image.open(io.BytesIO(shown.encoded_image_string))
    assert (moving.format, moving.n_frames, moving.size, shown.step) == ("GIF", 5, (48, 32), 2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_resumed_run_hides_the_steps_that_it_does_again(tmp_path):
    with reporter(tmp_path) as report:
        for step in (1, 2, 3):
            report.scalars(step, {"train/loss": step})
    with reporter(tmp_path, resume_step=2) as report:
        report.scalars(3, {"train/loss": 9})
    seen = [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")]
    assert seen == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_where_it_cannot_be_written_training_continues(tmp_path, capsys):
    (tmp_path / tensorboard_run.FOLDER).write_text("a file")
    with reporter(tmp_path) as report:
        report.scalars(1, {"train/loss": 0.5})
    assert "WARNING: TensorBoard is off: " in capsys.readouterr().err
    assert "0.5" in (tmp_path / "metrics.jsonl").read_text()
