"""Each job of `evaluate.py`, from its flags to what it writes."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from lpips_case import weights as lpips_arrays
from tiny_network import TINY

from cwm_jax.checkpoints import weights
from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data.records import Episode, encode
from cwm_jax.data.shards import write_shard
from cwm_jax.errors import UserError
from cwm_jax.evaluation import full, lpips, lpips_weights, probe
from cwm_jax.models import dit
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.programs import evaluate
from cwm_jax.programs.evaluate import outputs
from cwm_jax.rendering import video
from cwm_jax.simulator import game, venv

NETWORK = dataclasses.replace(TINY, depth=1, heads=True)
SMALL = "--clips 2 --horizon 2 --drift-frames 16 --batch-size 2 --n-prompt 1"


@pytest.fixture(scope="module")
def params():
    initial = dit.init(NETWORK, 0)
    keys = jax.random.split(jax.random.key(1), len(initial))
    return {
        name: leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, initial.items(), strict=True)
    }


@pytest.fixture
def model(tmp_path, params):
    """A file with a tiny network with heads, whose own number of denoising steps is 1."""
    config = {"model": dataclasses.asdict(NETWORK), "sampler": {"ddim_steps": 1}}
    weights.write(tmp_path / weights.NAME, params, {"step": 3, "config": config})
    return tmp_path / weights.NAME


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """run(job, words): `evaluate.py` with this model; returns the JSON of the output."""
    monkeypatch.setattr(probe, "_EPOCHS", 1)
    monkeypatch.setattr(probe, "_CLIPS", 4)

    def run(words, output=tmp_path / "out.json"):
        words = [*words.split(), "--checkpoint", str(model), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        evaluate.main()
        return output.is_file() and output.suffix == ".json" and json.loads(output.read_text())

    return run


@pytest.fixture
def recorded(tmp_path, marked_episode):
    """A data folder with rewards and ends, and one record without."""
    (tmp_path / "test").mkdir()
    episodes = [marked_episode(number, 8) for number in range(3)]
    done = np.arange(8) == 7
    extras = [{"rewards": 10 * done.astype(np.float32), "done": done}] * 2 + [{}]
    records = [encode(e, extra) for e, extra in zip(episodes, extras, strict=True)]
    write_shard(tmp_path / "test" / "data_0000.array_record", records)
    return tmp_path


@pytest.fixture
def noise(tmp_path):
    """A data folder of random frames."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        frames = rng.integers(256, size=(2, 33, *FRAME_SHAPE), dtype=np.uint8)
        actions = rng.integers(NUM_ACTIONS, size=(2, 33), dtype=np.int32)
        records = [encode(Episode(*parts)) for parts in zip(frames, actions, strict=True)]
        write_shard(tmp_path / split / "data_0000.array_record", records)
    return tmp_path


@pytest.mark.parametrize("ahead", [0, 2])
def test_outcomes_are_measured_on_real_frames_and_on_rollouts(run, recorded, params, ahead, capsys):
    found = run(f"outcomes --data {recorded} --ahead {ahead} --records 3")
    conditions = found["conditions"]
    assert conditions["fingerprint"] == fingerprint(NETWORK, params).hex()
    assert (conditions["records"], conditions["ahead"]) == (3, ahead)
    assert found["real_frames"]["end"]["frames"]["real"] == 2
    assert found["real_frames"]["reward"]["frames"]["of"] == 16
    assert ("rollouts" in found) == bool(ahead)
    if ahead:
        assert conditions["levels"] == [999]
        frames = found["rollouts"]["end"]["frames"]
        assert (frames["real"], frames["of"]) == (2, 4)
    assert "real frames of 2 records: precision, recall" in capsys.readouterr().out


def test_a_model_is_measured_with_its_own_steps_and_compared(
    run, noise, tmp_path, capsys, monkeypatch
):
    words = f"{SMALL} --data {noise} --seeds 0 --no-single-step --no-report --probes {tmp_path}"
    assert run(words)["protocol"]["levels"] == [999]
    assert "numbers → " in capsys.readouterr().out
    output = str(tmp_path / "out.json")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", output, output])
    evaluate.main()
    assert output in capsys.readouterr().out


def test_settings_are_ranked_and_written_to_a_folder(run, noise, tmp_path, monkeypatch, capsys):
    net = lpips.from_arrays(lpips_arrays(), "random")
    monkeypatch.setattr(lpips_weights, "available", lambda: net)
    run(f"settings {SMALL} --data {noise} --steps 2 --probes {tmp_path}", tmp_path / "settings")
    found = json.loads((tmp_path / "settings" / "2_hop.json").read_text())
    assert found["protocol"]["levels"] == [999, 499]
    assert "S = 2, hop" in capsys.readouterr().out


def test_the_game_and_the_model_are_played_in_a_closed_loop(run, tmp_path, monkeypatch, capsys):
    class Simulator:
        def __init__(self, python):
            pass

        __enter__ = lambda self: self
        __exit__ = lambda *_: None

        def replay(self, name, runs):
            frames = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
            return [
                game.Replay(np.repeat(frames[None], len(keys) + 1, 0), np.zeros(len(keys)), False)
                for _, keys in runs
            ]

    monkeypatch.setattr(game, "Simulator", Simulator)
    monkeypatch.setattr(venv, "ensure", lambda folder: folder)
    run("closed-loop --levels 2 --frames 4", tmp_path / "loop.mp4")
    assert len(video.read_mp4(tmp_path / "loop.mp4")) == 4
    assert "2 of 2 levels lasted 4 frames\nPSNR" in capsys.readouterr().out


def test_numbers_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    results = {"psnr": 3.5, "of": float("nan")}
    monkeypatch.setattr(full, "write_json", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: .*No space.*\n.*stdout"):
        outputs.write_numbers(tmp_path / "x.json", results)
    assert json.loads(capsys.readouterr().out) == {"psnr": 3.5, "of": None}
