"""The card of an export: facts of training, measurements, and what is missing."""

import numpy as np
import pytest

from cwm_jax.checkpoints import weights
from cwm_jax.experiment import card_measurement, model_card
from cwm_jax.runtime import subprograms

META = {
    "step": 50,
    "config": {
        "model": {"depth": 2},
        "data": {"dir": "data/mine", "batch_size": 8, "global_batch_size": 4, "clip_len": 12},
    },
}


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "out" / "model.safetensors"
    path.parent.mkdir()
    weights.write(path, {"a": np.zeros((3, 5)), "b": np.zeros(7)}, META)
    lines = ['{"step": 40, "train/minutes": 1.5}', '{"step": 60, "train/minutes": 9.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def results(psnr, *, lpips=None):
    """As of `evaluate.py`, with a model of this PSNR (dB) and a floor of 10."""
    of = lambda value: {"mean": value, "low": value - 1, "high": value + 1}
    at = lambda value: {"at": {"1": of(value), "10": of(value - 2)}}
    side = lambda value: {"psnr": at(value)} | ({"lpips": at(lpips)} if lpips else {})
    return {
        "rollout": {"prompt_4": {"model": side(psnr), "copy_last": side(10)}},
        "protocol": {"n_prompt": [4], "split": "test"},
        "clips": {"used": 3},
        "device": "cpu",
        "probe": {"keys_of_real": {"left": 0.5, "jump": None}},
        "drift": {
            "frames": 48,
            "by_window": {"sharpness": {"mean": [1.0, 0.9, 0.75]}},
            "frames_to_collapse": of(40),
        },
    }


def test_the_facts_of_training_are_those_of_the_export_and_its_run(exported):
    metrics = exported.parent.parent / "metrics.jsonl"
    facts = model_card.training(*weights.describe(exported), metrics, "cpu, 2 cores")
    assert facts["parameters"] == "22"
    assert facts["training frames"] == "2,400 (4 clips of 12 an update)"
    assert facts["minutes"] == "1.5, compilation included"  # not that of step 60
    absent = model_card.training(*weights.describe(exported), metrics.with_name("no"), "cpu")
    assert "minutes" not in absent


def test_the_table_has_a_column_for_each_number_of_steps_and_the_floor():
    text = model_card.text({"updates": "50"}, {4: results(21.5), 1: results(20.25)}, ["S = 2 is."])
    assert "| | floor | S = 1 | S = 4 |" in text
    assert (
        "| PSNR, dB, at frame 1 | 10.00 [9.00, 11.00] | 20.25 [19.25, 21.25] "
        "| 21.50 [20.50, 22.50] |"
    ) in text
    assert "| left, as readable as in the game |  | 50 % | 50 % |" in text
    assert "| jump, as readable as in the game |  | – | – |" in text
    assert "of 48 frames; 1: real |  | 1.00, 0.75 | 1.00, 0.75 |" in text
    assert "LPIPS was not measured" in text
    assert "S = 2 is." in text
    assert "LPIPS was not measured" not in model_card.text({}, {1: results(20, lpips=0.1)}, [])


def test_a_measurement_that_fails_or_lacks_time_is_noted(exported, monkeypatch, capsys):
    codes = {2: 0, 1: 3, 4: subprograms.TOO_LONG}
    monkeypatch.setattr(card_measurement.comparison, "read", lambda path: results(20))

    def run(words, *, seconds):
        assert 0 < seconds <= 60
        return codes[int(words[words.index("--ddim-steps") + 1])]

    monkeypatch.setattr(subprograms, "run", run)
    clips = card_measurement.ON_CPU
    card_measurement.write(exported, exported.parent.parent, "cpu", minutes=1, clips=clips)
    text = exported.with_name("card.md").read_text()
    assert "| | floor | S = 2 |" in text
    assert "S = 1 was not measured: evaluate.py ended with 3." in text
    assert "S = 4 was not measured: its 1 minutes were over." in text
    assert "S = 4 was not measured" in capsys.readouterr().err


def test_a_card_that_cannot_be_written_is_logged(tmp_path, capsys):
    missing = tmp_path / "model.safetensors"
    card_measurement.write(missing, tmp_path, "cpu", minutes=1, clips=card_measurement.ON_CPU)
    assert "card.md is not complete: UserError" in capsys.readouterr().err
