"""Recordings without actions: labels match their frames, and the folder marks them as inferred."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from cwm_jax.coinrun import MEANINGFUL_ACTIONS
from cwm_jax.controls import METADATA
from cwm_jax.data import clips, loader, shards
from cwm_jax.data.config import DataConfig
from cwm_jax.evaluation import action_labels, probe
from cwm_jax.rendering import video
from cwm_jax.tools import check, pack, preview


def shade(t):
    """Brightness of frame t; steps of 3 survive a video's compression."""
    return 3 * (t % 80)


@pytest.fixture
def videos(tmp_path):
    """Videos of 41, 30 and 22 frames whose brightness counts them."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, length in enumerate((41, 30, 22)):
        times = range(3 * number, 3 * number + length)
        frames = (np.full((64, 64, 3), shade(t), np.uint8) for t in times)
        video.write_mp4(folder / f"run{number}.mp4", frames, fps=15)
    return folder


@pytest.fixture
def inferred(monkeypatch):
    """The action inferred at a frame is its number, read from its brightness, modulo 15."""

    def label(frames):
        counted = np.array([round(float(f.mean()) / 3) for f in frames])
        return (counted[1:-1] % 15).astype(np.int32)

    note = {
        "accuracy": {"mean": 0.7, "low": 0.6, "high": 0.8},
        "accuracy_floor": 0.5,
        "balanced": 0.4,
        "balanced_floor": 1 / 6,
        "measured_on": {"clips": 3, "actions": 90},
    }
    monkeypatch.setattr(pack, "_inference", lambda folder: pack.Inference(label, note))
    return note


def test_labels_match_their_frames_and_are_marked_as_inferred(videos, inferred, tmp_path, capsys):
    out = tmp_path / "packed"
    flags = ["--chunk", "15", "--min-chunk", "5", "--jobs", "1"]
    pack.main([str(videos), "--infer-actions", "data", "--output", str(out), *flags])
    lengths = []
    for split in shards.SPLITS:
        found = clips.Episodes(shards.find_shards(out, split))
        for number in range(len(found)):
            episode = found[number]
            times = round(episode.frames[0].mean() / 3) + np.arange(len(episode))
            np.testing.assert_array_equal(episode.actions, times % 15)
            assert times[0] > 0
            lengths.append(len(episode))
    assert sorted(lengths) == [5, 9, 13, 15, 15, 15, 15]  # 39 = 15 + 15 + 9, 28 = 15 + 13, …
    assert json.loads((out / METADATA).read_text())["inferred_actions"] == inferred
    batches = loader.train_batches(
        DataConfig(num_workers=0, dir=str(out), clip_len=5), batch_size=1, seed=0
    )
    assert next(batches)["frames"].shape == (1, 5, 64, 64, 3)
    batches.close()
    check.main([str(out), "--clip-len", "5"])
    shown = tmp_path / "preview.mp4"
    preview.main(["--data", str(out), "--n-episodes", "1", "--output", str(shown)])
    printed = "inferred from frames, not recorded; of held-out real ones 70.0 % are right"
    assert capsys.readouterr().out.count(printed) == 3
    assert printed in shown.with_suffix(".html").read_text()


def test_flags_that_conflict_are_named(videos, inferred, tmp_path, capsys):
    out = ["--output", str(tmp_path / "packed")]
    (videos / "run0.csv").write_text("action\n" + "0\n" * 41)
    for flags, fault in (
        (["--infer-actions", "data"], "run0.csv: pack it without --infer-actions"),
        ([], "give one of the two: --keys"),
        (["--infer-actions", "data", "--keys", "keys.toml"], "give one of the two: --keys"),
    ):
        with pytest.raises(SystemExit):
            pack.main([str(videos), *out, *flags])
        assert fault in capsys.readouterr().err


def test_data_of_another_game_cannot_teach_coinrun(tmp_path, capsys):
    (tmp_path / METADATA).write_text('{"game": "chess", "actions": ["e4", "d4"]}')
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path), "--infer-actions", str(tmp_path), "--output", str(tmp_path)])
    assert (
        "its data is of chess; actions can be inferred for CoinRun only" in capsys.readouterr().err
    )


def test_labels_of_blocks_are_those_of_the_whole(monkeypatch):
    reader = probe.Probe(nnx.state(probe.Reader(rngs=nnx.Rngs(jax.random.key(3)))), "untrained")
    frames = np.random.default_rng(0).integers(256, size=(23, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(action_labels, "_BLOCK", 10)
    found = action_labels.label(reader, iter(frames))
    wanted = np.array(MEANINGFUL_ACTIONS)[probe.read(reader, frames[None])[0]]
    np.testing.assert_array_equal(found, wanted)
    assert len(action_labels.label(reader, iter(frames[:2]))) == 0


def test_accuracy_stands_beside_its_floors(monkeypatch):
    rng = np.random.default_rng(0)
    actions = rng.choice([4, 4, 4, 7, 5], size=(6, 20)).astype(np.int32)  # stand, right, jump
    always_stand = np.full((6, 18), probe.GROUP_NAMES.index("stand"))
    monkeypatch.setattr(probe, "read", lambda reader, frames: always_stand)
    found = action_labels.accuracy(None, np.zeros((6, 20, 64, 64, 3), np.uint8), actions)
    share = (actions[:, 2:] == 4).mean()
    assert found["accuracy"]["mean"] == pytest.approx(share)
    assert found["accuracy_floor"] == pytest.approx(share)
    assert found["balanced"] == pytest.approx(found["balanced_floor"])
    assert found["measured_on"] == {"clips": 6, "actions": 108}
