"""Training data in device memory: the same batches as from the files, within what fits."""

import functools
import itertools
import threading

import jax
import numpy as np
import pytest

from cwm_jax.data import device_data, loader
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import BadRecord, encode
from cwm_jax.data.shards import write_shard
from cwm_jax.errors import UserError
from cwm_jax.runtime import sharding

LENGTHS = [[11, 12], [14, 9, 30], [7]]


@pytest.fixture
def config(make_data, monkeypatch):
    monkeypatch.setattr(device_data, "_CHUNK_FRAMES", 20)
    return DataConfig(
        num_workers=0, dir=str(make_data(train=LENGTHS)), clip_len=5, stride=3, on_device=1000
    )


def batches_of(config, *, on_device=True):
    make = functools.partial(device_data.DeviceBatches, mesh=sharding.make_mesh())
    make = make if on_device else loader.TrainBatches
    return loader.train_batches(config, batch_size=3, seed=4, make=make)


def taken(batches, count):
    return [jax.device_get(batch) for batch in itertools.islice(batches, count)]


def filled(batches):
    """With everything on the device, as a slow reader would have it in the end."""
    batches._wanted = 10**9
    return batches


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for name in ("frames", "actions"):
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_those_of_the_files(config):
    plain, batches = batches_of(config, on_device=False), filled(batches_of(config))
    assert_same(taken(batches, 12), taken(plain, 12))
    assert batches.per_epoch == plain.per_epoch
    assert batches.origins(11) == plain.origins(11)
    batches.close()
    plain.close()


def test_a_resumed_run_reloads_its_clips_before_it_continues(config):
    batches = filled(batches_of(config))
    taken(batches, 4)
    state = batches.get_state()
    following = taken(batches, 3)
    batches.close()
    resumed = batches_of(config)
    resumed.set_state(state)
    assert_same(taken(resumed, 3), following)
    resumed.close()
    plain = batches_of(config, on_device=False)  # the position is also one in the files
    plain.set_state(state)
    assert_same(taken(plain, 3), following)
    plain.close()


def test_only_so_many_frames_are_kept(config):
    """The first two records, of 3 + 3 clips; their numbers are in pixel (0, 0)."""
    few = DataConfig(**{**vars(config), "on_device": 36})
    batches = filled(batches_of(few))
    found = np.concatenate([batch["frames"] for batch in taken(batches, 30)])
    assert set(found[:, 0, 0, 0, 0].tolist()) == {0, 1}
    assert batches.get_state()["clips_on_device"] == 6
    batches.close()
    with pytest.raises(UserError, match=r"on_device=10 frames: the first record has 11"):
        batches_of(DataConfig(**{**vars(config), "on_device": 10}))


def test_training_begins_with_the_clips_read_so_far(config, monkeypatch):
    go_on, read = threading.Event(), device_data.DeviceBatches._episode

    def slowly(batches, number):
        assert number == 0 or go_on.wait(60)
        return read(batches, number)

    monkeypatch.setattr(device_data.DeviceBatches, "_episode", slowly)
    batches = batches_of(config)
    found = np.concatenate([batch["frames"] for batch in taken(batches, 10)])
    assert set(found[:, 0, 0, 0, 0].tolist()) == {0}
    go_on.set()
    found = np.concatenate([batch["frames"] for batch in taken(filled(batches), 30)])
    assert set(found[:, 0, 0, 0, 0].tolist()) == set(range(6))
    batches.close()


def with_a_bad_record(config, marked_episode, tmp_path):
    path = tmp_path / "train" / "data_0001.array_record"
    path.unlink()
    good = [encode(marked_episode(2 + k, n)) for k, n in enumerate(LENGTHS[1])]
    bad = bytes(len(good[0]))
    write_shard(path, [good[0], bad, *good[1:]])


def test_bad_records_stop_it_or_are_skipped(config, marked_episode, tmp_path, capsys):
    with_a_bad_record(config, marked_episode, tmp_path)
    batches = filled(batches_of(config))
    with pytest.raises(BadRecord, match=r"data_0001\.array_record, record 1"):
        taken(batches, 3)
    batches.close()
    skipping = DataConfig(**{**vars(config), "on_bad_record": "skip"})
    batches = filled(batches_of(skipping))
    found = np.concatenate([batch["frames"] for batch in taken(batches, 60)])
    assert set(found[:, 0, 0, 0, 0].tolist()) == set(range(6))
    assert batches.bad_records == 1
    batches.close()


def test_too_little_memory_is_reported(config, monkeypatch):
    monkeypatch.setattr(device_data, "_memory", lambda: 10**6)
    with pytest.raises(UserError, match=r"config\.data\.on_device=1000: \d+ frames take 0\.0 GiB"):
        next(batches_of(config))


def test_several_devices_are_refused(config):
    class Two:
        size = 2

    make = functools.partial(device_data.DeviceBatches, mesh=Two())
    with pytest.raises(UserError, match=r"on_device=1000 keeps data on one device.* are 2"):
        loader.train_batches(config, batch_size=3, seed=4, make=make)
