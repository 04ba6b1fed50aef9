"""Rewards and ends of episodes, from a record to a batch."""

import numpy as np
import pytest

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.data import loader, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import BadRecord, decode, encode
from cwm_jax.data.shards import write_shard
from cwm_jax.errors import UserError


def outcomes_of(length, *, ends=True):
    """Rewards and ends as the recorder keeps them; action i earns i / 2."""
    done = np.zeros(length, bool)
    done[-1] = ends
    return {"rewards": np.arange(length, dtype=np.float32) / 2, "done": done}


@pytest.fixture
def folder(tmp_path, marked_episode):
    """Records of 13 and 9 frames with outcomes, and one of 11 without."""
    (tmp_path / "train").mkdir()
    episodes = [marked_episode(number, length) for number, length in enumerate((13, 9, 11))]
    extras = [outcomes_of(13), outcomes_of(9, ends=False), {}]
    records = [encode(e, extra) for e, extra in zip(episodes, extras, strict=True)]
    write_shard(tmp_path / "train" / "data_0000.array_record", records)
    return tmp_path


def test_outcomes_are_read_if_requested_and_present(marked_episode):
    record = encode(marked_episode(1, 5), outcomes_of(5))
    assert decode(record).outcomes is None
    read = decode(record, outcomes=True).outcomes
    np.testing.assert_array_equal(read.rewards, np.arange(5) / 2)
    assert read.done.tolist() == [False] * 4 + [True]
    assert decode(encode(marked_episode(1, 5)), outcomes=True).outcomes is None
    alone = {"rewards": outcomes_of(5)["rewards"]}
    assert decode(encode(marked_episode(1, 5), alone), outcomes=True).outcomes is None


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"rewards": np.zeros(4)}, r"rewards have shape \(4,\)"),
        ({"rewards": 3}, "rewards are int"),
        ({"rewards": np.full(5, np.nan)}, "not all finite"),
        ({"done": np.zeros(5, np.int32)}, "done are int32, not an array of booleans"),
        ({"done": np.arange(5) == 2}, "done is true at frame 2 of 5"),
    ],
)
def test_invalid_outcomes_are_reported_only_if_requested(marked_episode, wrong, fault):
    record = encode(marked_episode(1, 5), outcomes_of(5) | wrong)
    assert len(decode(record)) == 5
    with pytest.raises(BadRecord, match=fault):
        decode(record, outcomes=True)


def test_a_batch_has_the_outcomes_of_its_pressed_actions(folder):
    config = DataConfig(num_workers=0, dir=str(folder), clip_len=6, stride=4)
    clips = splits.open_clips(config, "train", outcomes=True)
    assert [clips.locate(i) for i in range(len(clips))] == [(0, 0), (0, 7), (1, 3), (2, 0), (2, 5)]
    batch = clips.batch([0, 1, 2, 4])
    np.testing.assert_array_equal(batch["pressed"][:, :-1], batch["actions"][:, 1:])
    assert batch["pressed"][1, -1] == 12  # action t of episode 0 is t
    np.testing.assert_array_equal(batch["rewards"][1], np.arange(7, 13) / 2)
    assert batch["ends"][:3].tolist() == [[0] * 6, [0] * 5 + [1], [0] * 6]
    assert np.isnan(batch["rewards"][3]).all()
    assert np.isnan(batch["ends"][3]).all()
    plain = splits.open_clips(config, "train").batch([0, 2])
    assert set(plain) == {"frames", "actions"}
    assert [int(f) for f in plain["frames"][:, 0, 0, 0, 1]] == [0, 0]
    assert (plain["actions"][:, 0] == NO_ACTION).all()


def test_batches_on_the_device_are_those_of_the_files(folder):
    from cwm_jax.data.device_data import DeviceBatches
    from cwm_jax.runtime import sharding

    config = dict(dir=str(folder), clip_len=6, stride=4, num_workers=0)
    how = dict(batch_size=5, seed=3, outcomes=True, epochs=1)
    read = next(loader.train_batches(DataConfig(**config), **how))
    make = lambda *args: DeviceBatches(*args, mesh=sharding.make_mesh())
    batches = loader.train_batches(DataConfig(on_device=100, **config), make=make, **how)
    kept = next(batches)
    batches.close()
    assert set(read) == set(kept)
    for name, values in read.items():
        np.testing.assert_array_equal(values, kept[name])


def test_data_without_outcomes_is_refused_where_they_are_needed(make_data):
    config = DataConfig(num_workers=0, dir=str(make_data(train=[[8, 9]])), clip_len=6)
    splits.open_clips(config, "train")
    with pytest.raises(UserError, match=r"have no rewards .*tools\.collect.*heads=False"):
        splits.open_clips(config, "train", outcomes=True)
