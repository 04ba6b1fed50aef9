"""Metrics are read while the next step runs, so that the device never waits."""

import numpy as np
import pytest

from cwm_jax.errors import UserError
from cwm_jax.experiment import progress


class Recorder:
    def __init__(self):
        self.steps = []

    def scalars(self, step, values):
        self.steps.append((step, values["train/loss"]))


def metrics(loss, skipped=0):
    numbers = {"train/loss": loss, "train/grad_norm": 1.0, "train/skipped": skipped}
    return {name: np.float32(value) for name, value in numbers.items()}


def made(recorder, workdir, max_skipped=0, **kernels):
    counts = dict(frames_per_step=6, skipped=0, max_skipped=max_skipped, kernels=kernels)
    return progress.Progress(recorder, workdir, lambda step: [{"clip": step}], **counts)


def test_metrics_are_reported_a_step_late(tmp_path):
    recorder = Recorder()
    late = made(recorder, tmp_path)
    late.after(1, metrics(0.5), reported=True)
    assert recorder.steps == []
    late.after(2, metrics(0.4), reported=False)
    assert recorder.steps == [(1, 0.5)]
    late.after(3, metrics(0.25), reported=True)
    late.catch_up()
    late.catch_up()
    assert recorder.steps == [(1, 0.5), (3, 0.25)]


def test_one_skipped_update_too_many_stops_the_run_a_step_late(tmp_path):
    late = made(Recorder(), tmp_path, max_skipped=1)
    late.after(1, metrics(np.nan, skipped=1), reported=False)
    late.after(2, metrics(np.inf, skipped=2), reported=False)  # one is allowed
    with pytest.raises(UserError, match=r"step 2 has loss inf.*\n.*max_skipped_updates=1"):
        late.after(3, metrics(0.4, skipped=2), reported=False)
    assert sorted(path.name for path in (tmp_path / progress.FOLDER).iterdir()) == [
        "step_0000001.json",
        "step_0000002.json",
    ]


@pytest.mark.parametrize("norm", ["triton", "xla"])
def test_a_skipped_update_names_the_kernels_and_how_to_resume_without_them(tmp_path, norm):
    late = made(Recorder(), tmp_path, attention="fused", norm=norm)
    late.after(1, metrics(0.5, skipped=1), reported=False)
    message = rf"(?s)computed with attention=fused, norm={norm}.*"
    message += r"--config\.model\.attention=xla --config\.model\.norm=xla"
    with pytest.raises(UserError, match=message):
        late.catch_up()


def test_with_xlas_kernels_no_others_are_suggested(tmp_path, capsys):
    late = made(Recorder(), tmp_path, attention="xla", norm="xla")
    late.after(1, metrics(np.nan, skipped=1), reported=False)
    with pytest.raises(UserError, match=r"computed with attention=xla, norm=xla") as stopped:
        late.catch_up()
    assert "--config" not in str(stopped.value)
