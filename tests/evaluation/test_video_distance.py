"""I3D against the package of its weights; KVD, FVD and their floor."""

import json

import i3d_case
import numpy as np
import pytest

from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import i3d, i3d_weights, video_distance
from cwm_jax.evaluation.video_distance import Plan


@pytest.fixture(scope="module")
def net() -> i3d.I3d:
    return i3d.from_arrays(i3d_weights._renamed(i3d_case.published()), "random")


def test_features_are_those_of_the_package(net):
    (wanted,) = json.loads(i3d_case.REFERENCE.read_text()).values()
    found = i3d.features(net, i3d_case.videos())
    assert found.shape == (1, i3d.FEATURES)
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-4)  # of numbers up to 17


def test_videos_that_cannot_be_measured_are_refused(net):
    good = np.zeros((2, 9, 4, 4, 3), np.float32)
    i3d.check(good)
    assert i3d.features(net, good[:0]).shape == (0, i3d.FEATURES)
    with pytest.raises(UserError, match=r"8 frames are too short.*9"):
        i3d.features(net, good[:, :8])
    with pytest.raises(UserError, match="RGB"):
        i3d.features(net, good[..., :1])
    good[1, 4, 2, 2, 0] = np.nan
    with pytest.raises(UserError, match="video 1 is not finite"):
        i3d.features(net, good)


def test_kvd_is_unbiased_and_fvd_is_not():
    rng = np.random.default_rng(0)
    alike = lambda: rng.normal(size=(24, 40))
    pairs = [(alike(), alike()) for _ in range(200)]
    kvd = np.array([video_distance.kernel_distance(*pair) for pair in pairs])
    assert abs(kvd.mean()) < 3 * kvd.std() / len(kvd) ** 0.5
    assert min(video_distance.frechet_distance(*pair) for pair in pairs[:20]) > 10
    apart = video_distance.kernel_distance(alike(), alike() + 0.5)
    assert apart > kvd.mean() + 4 * kvd.std()


def test_clips_of_one_record_bias_nothing_and_the_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    records = np.arange(60) // 4

    def side():  # clips of a record have most in common
        return rng.normal(size=(15, 20)).repeat(4, axis=0) + 0.5 * rng.normal(size=(60, 20))

    found = [
        video_distance.summary(side() + 0.6, side(), side(), records, records)["kvd"]
        for _ in range(25)
    ]
    floor = np.array([x["floor"]["mean"] for x in found])
    assert abs(floor.mean()) < 3 * floor.std() / 5
    assert np.mean([x["floor"]["low"] <= 0 <= x["floor"]["high"] for x in found]) > 0.8
    assert np.mean([x["model_minus_floor"]["low"] > 0 for x in found]) > 0.8


def test_too_few_clips_are_refused_unless_forced():
    with pytest.raises(UserError, match=r"--kvd 255: .*256 or more, or --force"):
        Plan(clips=255)
    assert Plan(clips=24, force=True).clips == 24
    assert Plan(clips=256).clips == 256
    for wrong in ({"clips": 1, "force": True}, {"clips": 256, "frames": 8}):
        with pytest.raises(UserError):
            Plan(**wrong)


def test_the_two_sides_are_of_different_records_and_no_frame_counts_twice(make_data):
    config = DataConfig(num_workers=0, dir=str(make_data(test=[[40, 65, 20], [61, 40, 19]])))
    plan = Plan(clips=4, force=True)
    ours, others = video_distance.load(config, plan)
    assert not set(ours.records) & set(others.records)
    assert ours.frames.shape == (4, 20, 64, 64, 3)
    for side in (ours, others):
        marks = side.frames[:, :, 0, 0]  # (record, frame, 0)
        np.testing.assert_array_equal(marks[..., 0], side.records[:, None].repeat(20, axis=1))
        assert len(np.unique(marks.reshape(-1, 3), axis=0)) == 80
    with pytest.raises(UserError, match=r"--kvd 9: .*has \d clips of 20 frames"):
        video_distance.load(config, Plan(clips=9, force=True))


def test_a_model_that_is_real_is_at_the_floor(make_data, net, monkeypatch):
    brightness = lambda _, clips, label: clips.astype(np.float32).mean((2, 3, 4))[:, :9]
    monkeypatch.setattr(i3d, "features", brightness)
    config = DataConfig(num_workers=0, dir=str(make_data(test=[[60] * 6])))
    plan = Plan(clips=6, force=True, n_prompt=4)
    ours, _ = video_distance.load(config, plan)
    generate = lambda prompt, actions, key: ours.frames[:, 4:]
    found = video_distance.measure(generate, net, config, plan)
    assert found["kvd"]["model"] == found["kvd"]["floor"]
    assert found["kvd"]["model_minus_floor"] == {"mean": 0, "low": 0, "high": 0}
    assert found["fvd"]["model"] == found["fvd"]["floor"]
    assert (found["clips"], found["records"]) == (6, [3, 3])
