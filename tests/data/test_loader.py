"""Clips and batches: every clip once, shuffled, shared among processes, and resumable."""

import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from cwm_jax.coinrun import NO_ACTION, NUM_ACTIONS
from cwm_jax.data import clips as clips_module
from cwm_jax.data import shared_memory
from cwm_jax.data.clips import Clips, Episodes, clip_counts
from cwm_jax.data.config import DataConfig
from cwm_jax.data.loader import eval_batches, train_batches
from cwm_jax.data.records import BadRecord, encode
from cwm_jax.data.shards import find_shards, write_shard
from cwm_jax.data.splits import load_clips, open_clips, open_episodes, pick_episodes
from cwm_jax.errors import UserError
from cwm_jax.sampling import rollouts

EMBEDDED = Path(__file__).parents[2] / "assets/coinrun"
LENGTHS = [[40, 33, 31], [], [160], [32, 47]]  # clips of 32 every 8: 2, 1, 0, 17, 1, 2 = 23


@pytest.fixture
def config(make_data) -> DataConfig:
    return DataConfig(num_workers=0, dir=str(make_data(train=LENGTHS, val=LENGTHS)), num_threads=2)


def places(batch) -> list[tuple[int, int]]:
    """(episode, first frame) of each clip, once every frame and action is what it should be."""
    frames, actions = batch["frames"], batch["actions"]
    assert (frames.dtype, actions.dtype) == (np.uint8, np.int32)
    assert frames.shape == (*actions.shape, 64, 64, 3)
    numbers, times = frames[:, :, 0, 0, 0].astype(int), frames[:, :, 0, 0, 1].astype(int)
    assert (numbers == numbers[:, :1]).all()
    assert (times == times[:, :1] + np.arange(times.shape[1])).all()
    assert not frames[:, :, 1:].any()
    assert (actions[:, 0] == NO_ACTION).all()
    led_here = (7 * numbers[:, 1:] + times[:, 1:] - 1) % NUM_ACTIONS
    np.testing.assert_array_equal(actions[:, 1:], led_here)
    return list(zip(numbers[:, 0].tolist(), times[:, 0].tolist(), strict=True))


def every_clip(lengths=LENGTHS, clip_len=32, stride=8) -> list[tuple[int, int]]:
    """The slow way: try every frame of every episode as a start."""
    flat = [length for shard in lengths for length in shard]
    return [
        (number, start)
        for number, length in enumerate(flat)
        for start in range(length)
        if start % stride == 0 and start + clip_len <= length
    ]


def taken(batches, count: int | None = None) -> list[list[tuple[int, int]]]:
    """The places of the next `count` batches, or of all."""
    try:
        if count is None:
            return [places(batch) for batch in batches]
        return [places(next(batches)) for _ in range(count)]
    finally:
        batches.close()


def flat(batches: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return list(itertools.chain.from_iterable(batches))


# Clips


@pytest.mark.parametrize("clip_len", [1, 2, 7, 31, 32, 33, 47])
@pytest.mark.parametrize("stride", [1, 3, 8, 50])
def test_clips_are_those_of_the_slow_way(make_data, clip_len, stride):
    data = make_data(val=LENGTHS)
    clips = Clips(Episodes(find_shards(data, "val")), clip_len=clip_len, stride=stride)
    expected = every_clip(clip_len=clip_len, stride=stride)
    assert [clips.locate(i) for i in range(len(clips))] == expected
    assert places(clips.batch(range(len(clips))[-3:])) == expected[-3:]


def test_clip_counts_of_usual_records():
    np.testing.assert_array_equal(
        clip_counts(np.array([160, 40, 32, 31, 1], np.int32), 32, 8), [17, 2, 1, 0, 0]
    )


def test_start_up_decodes_one_record_of_each_size(make_data, monkeypatch):
    data = make_data(train=[[40] * 5 + [33] * 4, [33, 40, 50]])
    decoded = []
    real = clips_module.decode
    monkeypatch.setattr(clips_module, "_INDEX_THREADS", 1)
    monkeypatch.setattr(
        clips_module, "decode", lambda raw, **kw: decoded.append(len(raw)) or real(raw, **kw)
    )
    episodes = Episodes(find_shards(data, "train"))
    assert episodes.lengths.tolist() == [40] * 5 + [33] * 4 + [33, 40, 50]
    assert len(decoded) == 3


def test_shards_of_another_layout_are_read_for_their_lengths(tmp_path, marked_episode):
    (tmp_path / "train").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "train/x.array_record"), "group_size:3")
    for number, length in enumerate([40, 33, 50, 40]):
        writer.write(encode(marked_episode(number, length)))
    writer.close()
    config = DataConfig(num_workers=0, dir=str(tmp_path))
    assert open_episodes(config, "train").lengths.tolist() == [40, 33, 50, 40]
    batches = train_batches(config, batch_size=1, seed=0, epochs=1)
    assert sorted(flat(taken(batches))) == every_clip([[40, 33, 50, 40]])


def test_embedded_data_counts():
    counts = json.loads((EMBEDDED / "metadata.json").read_text())
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) <= 8_000_000
    assert len(find_shards(EMBEDDED, "train")) == 2
    config = DataConfig(num_workers=0, dir=str(EMBEDDED))
    for split in ("train", "val", "test"):
        lengths = open_episodes(config, split).lengths
        found = {str(n): k for n, k in sorted(collections.Counter(lengths.tolist()).items())}
        assert found == counts["splits"][split]
        assert set(found) == {"40", "160"}


def test_embedded_clips_match_their_records():
    config = DataConfig(num_workers=0, dir=str(EMBEDDED))
    clips, episodes = open_clips(config, "test"), open_episodes(config, "test")
    number, start = clips.locate(len(clips) - 1)
    batch = clips.batch([len(clips) - 1])
    np.testing.assert_array_equal(batch["frames"][0], episodes[number].frames[start : start + 32])
    np.testing.assert_array_equal(
        batch["actions"][0, 1:], episodes[number].actions[start : start + 31]
    )


# Training batches


def test_an_epoch_holds_every_clip_once(config):
    epoch = taken(train_batches(config, batch_size=1, seed=5, epochs=1))
    assert len(epoch) == 23
    assert sorted(flat(epoch)) == every_clip()


def test_an_incomplete_batch_is_dropped(config):
    epoch = taken(train_batches(config, batch_size=5, seed=5, epochs=1))
    assert [len(batch) for batch in epoch] == [5, 5, 5, 5]
    assert len(set(flat(epoch))) == 20


def test_epochs_differ_in_order_and_each_is_complete(config):
    both = flat(taken(train_batches(config, batch_size=1, seed=5, epochs=2)))
    first, second = both[:23], both[23:]
    assert sorted(first) == sorted(second) == every_clip()
    assert first != second


def test_batches_go_on_for_ever(config):
    assert len(taken(train_batches(config, batch_size=23, seed=5), 4)) == 4


def test_the_order_depends_only_on_the_seed(config):
    order = taken(train_batches(config, batch_size=4, seed=5), 9)
    assert taken(train_batches(config, batch_size=4, seed=5), 9) == order
    assert taken(train_batches(config, batch_size=4, seed=6), 9) != order


def test_the_shuffle_mixes_all_shards(make_data):
    """A shuffle within shards or a window would give the first tenth few of 20 episodes."""
    config = DataConfig(num_workers=0, dir=str(make_data(train=[[160]] * 20)))
    order = flat(taken(train_batches(config, batch_size=2, seed=1), 17))
    assert len({number for number, _ in order}) >= 14
    assert len({start for _, start in order}) >= 12


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_each_global_batch(config, processes):
    alone = taken(train_batches(config, batch_size=6, seed=2), 7)
    shared = [
        taken(
            train_batches(config, batch_size=6, seed=2, process_index=p, process_count=processes),
            7,
        )
        for p in range(processes)
    ]
    assert all(len(batch) == 6 // processes for part in shared for batch in part)
    assert [flat(parts) for parts in zip(*shared, strict=True)] == alone


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 13])
def test_resuming_equals_going_on(config, cut):
    """With 5 batches an epoch, the cuts lie within, at and past the ends of epochs."""
    whole = taken(train_batches(config, batch_size=4, seed=3), 17)
    first = train_batches(config, batch_size=4, seed=3)
    assert taken(first, cut) == whole[:cut]
    state = json.loads(json.dumps(first.get_state()))
    resumed = train_batches(config, batch_size=4, seed=3)
    next(resumed)  # a position it must leave again
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert taken(resumed, 17 - cut) == whole[cut:]


def test_worker_processes_give_the_same_batches_and_resume(config):
    whole = taken(train_batches(config, batch_size=4, seed=3), 11)
    with_workers = DataConfig(dir=config.dir, num_threads=1, num_workers=2)
    batches = train_batches(with_workers, batch_size=4, seed=3)
    assert taken(batches, 3) == whole[:3]
    batches.set_state(batches.get_state())
    assert taken(batches, 4) == whole[3:7]
    threads_again = train_batches(config, batch_size=4, seed=3)
    threads_again.set_state(batches.get_state())
    assert taken(threads_again, 4) == whole[7:]


def test_a_finite_series_resumes_to_its_end(config):
    batches = train_batches(config, batch_size=4, seed=3, epochs=2)
    whole = taken(batches)
    assert len(whole) == 10
    resumed = train_batches(config, batch_size=4, seed=3, epochs=2)
    resumed.set_state({**batches.get_state(), "batches_taken": 8})
    assert taken(resumed) == whole[8:]
    resumed.set_state(batches.get_state())
    assert taken(resumed) == []


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("seed", {"seed": 4}),
        ("batch_size", {"batch_size": 5}),
        ("stride", {"stride": 4}),
        ("clip_len", {"clip_len": 31}),
    ],
)
def test_a_position_in_another_order_is_refused(config, field, other):
    def batches(seed=3, batch_size=4, **changes):
        changed = DataConfig(**{"dir": config.dir, "num_workers": 0, **changes})
        return train_batches(changed, batch_size=batch_size, seed=seed)

    with pytest.raises(UserError, match=rf"{field}=.*this run has"):
        batches().set_state(batches(**other).get_state())


# Evaluation


@pytest.mark.parametrize(("batch_size", "padding"), [(1, 0), (23, 0), (5, 2), (40, 17)])
def test_evaluation_sees_every_clip_once_in_order(config, batch_size, padding):
    batches = eval_batches(config, "val", batch_size=batch_size)
    for _ in range(2):  # it can be gone through again
        seen, masks = [], []
        for batch in batches:
            seen += places(batch)
            masks += batch["mask"].tolist()
        assert [place for place, real in zip(seen, masks, strict=True) if real] == every_clip()
        assert masks == [True] * 23 + [False] * padding
        assert len(seen) == len(batches) * batch_size
        assert set(seen[23:]) <= {seen[22]}
    assert batches.num_clips == 23


def test_a_limit_spreads_over_the_split(config):
    def seen(limit):
        batches = eval_batches(config, "val", batch_size=4, limit=limit)
        return [
            place
            for batch in batches
            for place, real in zip(places(batch), batch["mask"], strict=True)
            if real
        ]

    assert seen(100) == seen(23) == every_clip()
    assert seen(3) == [every_clip()[i] for i in (0, 7, 15)]
    with pytest.raises(UserError, match="limit is 0"):
        seen(0)


def test_processes_share_evaluation(config):
    alone = list(eval_batches(config, "val", batch_size=6, limit=20))
    parts = [
        list(eval_batches(config, "val", batch_size=6, limit=20, process_index=p, process_count=3))
        for p in range(3)
    ]
    for k, batch in enumerate(alone):
        for key in ("frames", "actions", "mask"):
            joined = np.concatenate([part[k][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])


def test_whole_episodes_by_number(config):
    episodes = open_episodes(config, "val")
    assert places(load_clips(episodes, [3, 0], length=40)) == [(3, 0), (0, 0)]
    assert load_clips(episodes, [3], length=160)["actions"].shape == (1, 160)
    with pytest.raises(UserError, match="41 frames of episode 0 were requested; it has 40"):
        load_clips(episodes, [0], length=41)
    with pytest.raises(UserError, match=r"no episode 6; valid are 0…5"):
        load_clips(episodes, [6], length=1)


def test_picked_episodes_are_different_long_enough_and_repeatable(make_data):
    episodes = open_episodes(
        DataConfig(num_workers=0, dir=str(make_data(val=[[160, 40] * 12]))), "val"
    )
    picked = pick_episodes(episodes, count=7, length=120, seed=1)
    assert len(set(picked)) == 7
    assert all(episodes.lengths[number] >= 120 for number in picked)
    assert pick_episodes(episodes, count=7, length=120, seed=1) == picked
    assert pick_episodes(episodes, count=7, length=120, seed=2) != picked
    with pytest.raises(UserError, match=r"13 episodes of at least 120 .*; 12 of 24 are that long"):
        pick_episodes(episodes, count=13, length=120)


# Mistakes and faults


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_len", 0), ("stride", 0), ("num_threads", 0), ("num_workers", -1), ("stride", 1.5)],
)
def test_settings_are_checked(field, value):
    with pytest.raises(UserError, match=rf"config\.data\.{field}(={value}: must be| must be int)"):
        DataConfig(**{field: value})


def test_a_clip_longer_than_all_episodes(config):
    too_long = DataConfig(num_workers=0, dir=config.dir, clip_len=161)
    with pytest.raises(UserError, match=r"clip_len is 161 .* longest of 6 episodes has 160"):
        train_batches(too_long, batch_size=1, seed=0)


def test_shards_without_records(make_data):
    with pytest.raises(UserError, match="train contains no records"):
        train_batches(
            DataConfig(num_workers=0, dir=str(make_data(train=[[], []]))), batch_size=1, seed=0
        )


def test_a_batch_larger_than_the_dataset(config):
    with pytest.raises(UserError, match=r"batch_size is 24, but .*train has only 23 clips"):
        train_batches(config, batch_size=24, seed=0)


def test_a_batch_that_cannot_be_shared(config):
    with pytest.raises(UserError, match=r"batch_size is 5; .* evenly among 2 processes"):
        train_batches(config, batch_size=5, seed=0, process_count=2)
    with pytest.raises(UserError, match="batch_size is 0"):
        eval_batches(config, "val", batch_size=0)


def test_a_seed_out_of_range(config):
    with pytest.raises(UserError, match=r"seed is -1; it must be 0…4294967295"):
        train_batches(config, batch_size=5, seed=-1)


def test_a_damaged_shard_is_named_at_the_start(config):
    shard = Path(config.dir) / "train/data_0002.array_record"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"data_0002\.array_record .* is not a complete ArrayRecord"
    ):
        train_batches(config, batch_size=1, seed=0)


@pytest.fixture
def spoiled(tmp_path, marked_episode) -> DataConfig:
    """Records of one size; number 1 of the second shard has an action that does not exist."""
    (tmp_path / "train").mkdir()
    good, bad = marked_episode(0, 40), marked_episode(1, 40)
    bad.actions[17] = 99
    for i, shard in enumerate([[good, good], [good, bad, good]]):
        write_shard(tmp_path / f"train/data_{i:04d}.array_record", map(encode, shard))
    return DataConfig(num_workers=0, dir=str(tmp_path), num_threads=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_is_named_when_its_batch_comes(spoiled, num_workers):
    config = DataConfig(dir=spoiled.dir, num_threads=1, num_workers=num_workers)
    batches = train_batches(config, batch_size=1, seed=0, epochs=1)
    with pytest.raises(BadRecord, match="action at frame 17 is 99") as caught:
        taken(batches)
    assert (caught.value.shard.name, caught.value.index) == ("data_0001.array_record", 1)


def test_num_actions_reaches_the_records(spoiled):
    batches = train_batches(spoiled, batch_size=1, seed=0, epochs=1, num_actions=100)
    assert len(list(batches)) == 10


def test_a_record_of_another_length_than_others_of_its_size_is_refused(tmp_path, marked_episode):
    """Two records of equal size, one with a frame less and as many bytes of something else."""
    (tmp_path / "train").mkdir()
    fields = pickle.loads(encode(marked_episode(0, 40)))
    shorter = pickle.loads(encode(marked_episode(1, 39)))
    record = pickle.dumps(fields, protocol=4)
    spare = len(record) - len(pickle.dumps(shorter | {"x": b"0" * 300}, protocol=4)) + 300
    other = pickle.dumps(shorter | {"x": b"0" * spare}, protocol=4)
    assert len(other) == len(record)
    write_shard(tmp_path / "train/a.array_record", [record, other])
    batches = train_batches(
        DataConfig(num_workers=0, dir=str(tmp_path)), batch_size=1, seed=0, epochs=1
    )
    with pytest.raises(BadRecord, match=r"a\.array_record, record 1: it has 39 frames; other"):
        taken(batches)


def test_reading_data_starts_no_jax_backend():
    program = f"""
import sys
from cwm_jax.data.config import DataConfig
from cwm_jax.data.loader import train_batches
ours = [name for name in sys.modules if name.startswith("cwm_jax")]
assert not any("jax" in vars(sys.modules[name]) for name in ours), ours
batches = train_batches(DataConfig(num_workers=0, dir={str(EMBEDDED)!r}), batch_size=2, seed=0)
next(batches)
batches.close()
bridge = sys.modules.get("jax._src.xla_bridge")  # Grain may import JAX by itself
assert not (bridge and bridge._backends), bridge._backends
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_record_that_claims_too_much_is_refused_before_it_is_read(config, monkeypatch):
    monkeypatch.setattr("cwm_jax.data.shards.MAX_RECORD_BYTES", 1_000_000)
    monkeypatch.setattr(clips_module, "read_record", None)
    (Path(config.dir) / "train/data_0000.array_record").unlink()
    with pytest.raises(BadRecord, match=r"data_0002\.array_record, record 0: it unpacks to 19"):
        train_batches(config, batch_size=1, seed=0)


# Bad records, dead workers


def spoil(config, shard=0, place=200):
    path = find_shards(config.dir, "train")[shard]
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)
    return path


def skipping(config, **changes):
    return dataclasses.replace(config, on_bad_record="skip", **changes)


def epoch_of(config, **sharing):
    return taken(train_batches(config, batch_size=4, seed=5, epochs=1, **sharing))


def test_a_record_that_rots_stops_the_run_with_its_place(config):
    batches = train_batches(config, batch_size=4, seed=5)
    path = spoil(config)
    with pytest.raises(BadRecord, match=f"{path}, record 0: its bytes in the file are damaged"):
        taken(batches, 6)


def test_a_shard_that_vanishes_stops_the_run_with_its_name(config):
    batches = train_batches(config, batch_size=4, seed=5)
    path = find_shards(config.dir, "train")[2]
    path.unlink()
    with pytest.raises(BadRecord, match=rf"{path}, record 0: .*no file"):
        taken(batches, 6)


def test_skipped_clips_give_way_to_those_of_the_next_good_record(config, capsys):
    whole = epoch_of(config)
    batches = train_batches(skipping(config), batch_size=4, seed=5, epochs=1)
    path = spoil(config)  # its episode 0, with 2 clips; the next is episode 1, from frame 0
    mended = taken(batches)
    expected = [[(1, 0) if place[0] == 0 else place for place in batch] for batch in whole]
    assert mended == expected
    assert batches.bad_records == 1
    message = capsys.readouterr().err
    assert message.count(f"{path}, record 0: ") == 1
    assert "1 of at most 100" in message


@pytest.fixture
def wrong_episode(marked_episode):
    """wrong_episode(number, length): one with an action that does not exist."""

    def make(number, length):
        episode = marked_episode(number, length)
        episode.actions[17] = 99
        return episode

    return make


def test_a_record_that_is_bad_at_the_start_is_skipped_as_later(
    config, marked_episode, wrong_episode
):
    """Two that are the first of their sizes: the next of that size is in the same shard, or not."""
    last = find_shards(config.dir, "train")[3]
    episodes = [wrong_episode(4, 37), marked_episode(5, 37), marked_episode(6, 40)]
    write_shard(last, map(encode, episodes))
    first = spoil(config)  # of 40 frames
    with pytest.raises(BadRecord, match=f"{first}, record 0"):
        epoch_of(config)
    batches = train_batches(skipping(config), batch_size=1, seed=5, epochs=1)
    assert batches.bad_records == 0
    found = collections.Counter(flat(taken(batches)))
    every = every_clip([[40, 33, 31], [], [160], [37, 37, 40]])
    instead = {0: (1, 0), 4: (5, 0)}
    assert found == collections.Counter(instead.get(place[0], place) for place in every)
    assert batches.bad_records == 2


def test_records_of_unknown_length_have_no_clips(config, wrong_episode, capsys):
    path = find_shards(config.dir, "train")[2]  # holds the only one of its size
    write_shard(path, [encode(wrong_episode(3, 160))])
    batches = train_batches(skipping(config), batch_size=1, seed=5, epochs=1)
    assert sorted(flat(taken(batches))) == every_clip([[40, 33, 31], [], [0], [32, 47]])
    assert batches.bad_records == 1
    assert capsys.readouterr().err.count(f"{path}, record 0: its action at frame 17 is 99") == 1
    batches.set_state({**batches.get_state(), "bad_episodes": []})
    assert batches.bad_records == 1
    episodes = open_episodes(skipping(config), "train")
    assert episodes.lengths.tolist() == [40, 33, 31, 0, 32, 47]
    with pytest.raises(BadRecord, match="its action at frame 17 is 99"):
        episodes[3]


def test_a_record_that_claims_too_much_can_be_skipped_and_is_never_read(config, monkeypatch):
    monkeypatch.setattr("cwm_jax.data.shards.MAX_RECORD_BYTES", 1_000_000)
    with pytest.raises(BadRecord, match="it unpacks to 19"):
        open_episodes(config, "train")
    episodes = open_episodes(skipping(config), "train")
    assert episodes.lengths.tolist() == [40, 33, 31, 0, 32, 47]
    monkeypatch.setattr(episodes._readers, "read", None)
    with pytest.raises(BadRecord, match="it unpacks to 19"):
        episodes[3]


def test_bad_records_of_another_layout_are_skipped(tmp_path, marked_episode, wrong_episode):
    (tmp_path / "train").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "train/x.array_record"), "group_size:3")
    for episode in (marked_episode(0, 40), wrong_episode(1, 40), marked_episode(2, 33)):
        writer.write(encode(episode))
    writer.close()
    config = DataConfig(num_workers=0, dir=str(tmp_path))
    with pytest.raises(BadRecord, match="record 1: its action"):
        open_episodes(config, "train")
    assert open_episodes(skipping(config), "train").lengths.tolist() == [40, 0, 33]


def test_too_many_bad_records_at_the_start_stop_the_run(tmp_path, wrong_episode):
    (tmp_path / "train").mkdir()
    bad = [encode(wrong_episode(number, 40)) for number in range(3)]
    write_shard(tmp_path / "train/x.array_record", bad)
    config = skipping(DataConfig(num_workers=0, dir=str(tmp_path)))
    with pytest.raises(BadRecord, match=r"record 0: its action at frame 17 is 99; .*14$"):
        open_episodes(config, "train")  # not one is good
    limited = dataclasses.replace(config, max_bad_records=1)
    with pytest.raises(BadRecord, match=r"record 1: .*14; more than 1 records are bad"):
        open_episodes(limited, "train")


def test_rollouts_start_from_good_records(make_data, marked_episode, wrong_episode):
    folder = make_data(val=[[40] * 5])
    config = skipping(DataConfig(num_workers=0, dir=str(folder)))
    sizes = dict(count=3, frames=20, n_prompt=1, num_actions=NUM_ACTIONS, source="random")
    number = lambda script: script.prompt[:, 0, 0, 0, 0].tolist()
    whole = rollouts.write_script(config, "val", **sizes)
    first, *others = number(whole)
    make = [wrong_episode if n == first else marked_episode for n in range(5)]
    records = [encode(make[n](n, 40)) for n in range(5)]
    write_shard(folder / "val/data_0000.array_record", records)
    with pytest.raises(BadRecord, match=f"record {first}: "):
        rollouts.write_script(DataConfig(num_workers=0, dir=str(folder)), "val", **sizes)
    replaced, *rest = number(rollouts.write_script(config, "val", **sizes))
    assert rest == others
    assert replaced not in number(whole)
    fewer = rollouts.write_script(config, "val", **sizes | {"count": 5})
    assert sorted(number(fewer)) == sorted({*range(5)} - {first})
    assert fewer.actions.shape == (4, 20)


def test_skipping_does_not_depend_on_who_reads(config):
    spoiled = skipping(config)
    opened = [
        train_batches(spoiled, batch_size=4, seed=5, epochs=1, process_index=i, process_count=2)
        for i in range(2)
    ]
    alone = train_batches(spoiled, batch_size=4, seed=5, epochs=1)
    spoil(config)
    halves = zip(*(taken(batches) for batches in opened), strict=True)
    assert [first + second for first, second in halves] == taken(alone)


def test_too_many_bad_records_stop_the_run_also_over_a_resume(config):
    limited = skipping(config, max_bad_records=1)
    batches = train_batches(limited, batch_size=4, seed=5)
    spoil(config)
    taken(batches, 5)  # an epoch
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    batches.set_state(state)
    spoil(config, shard=2)
    with pytest.raises(UserError, match=r"bad record number 2 .*data\.max_bad_records=1"):
        taken(batches, 6)
    with pytest.raises(UserError, match="on_bad_record must be one of stop, skip, not 'maybe'"):
        dataclasses.replace(config, on_bad_record="maybe")


def test_validation_skips_too(config, capsys):
    batches = eval_batches(skipping(config), "val", batch_size=4)
    path = find_shards(config.dir, "val")[0]
    raw = bytearray(path.read_bytes())
    raw[200] ^= 0x10
    path.write_bytes(raw)
    first = next(iter(batches))
    assert set(first) == {"frames", "actions", "mask"}
    assert places(first)[:3] == [(1, 0)] * 3
    assert f"{path}, record 0" in capsys.readouterr().err


def test_clips_are_traced_to_their_files(config):
    batches = train_batches(config, batch_size=4, seed=5)
    shards = find_shards(config.dir, "train")
    of_episode = [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]  # shard and record of each
    for number in (0, 3, 7):
        batches.set_state({**batches.get_state(), "batches_taken": number})
        expected = [
            {
                "shard": str(shards[of_episode[episode][0]]),
                "record": of_episode[episode][1],
                "first_frame": frame,
            }
            for episode, frame in taken(batches, 1)[0]
        ]
        assert batches.origins(number) == expected


def test_killed_workers_are_replaced_and_no_batch_is_lost(config, capsys):
    expected = taken(train_batches(config, batch_size=4, seed=5), 6)
    working = dataclasses.replace(config, num_workers=1, num_threads=1)
    batches = train_batches(working, batch_size=4, seed=5)
    found = [places(next(batches)) for _ in range(2)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    found += taken(batches, 4)
    assert found == expected
    assert "has exited" in capsys.readouterr().err


def test_other_data_of_the_same_shape_is_refused(config, tmp_path):
    state = train_batches(config, batch_size=4, seed=5).get_state()
    shard = find_shards(config.dir, "train")[0]
    shard.rename(shard.with_name("data_0000b.array_record"))
    with pytest.raises(UserError, match="shards="):
        train_batches(config, batch_size=4, seed=5).set_state(state)


def test_too_little_shared_memory_for_reading_processes_is_reported(tmp_path, monkeypatch, capsys):
    free = lambda amount: monkeypatch.setattr(
        shared_memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=amount)
    )
    free(36 * 50_000_000)
    shared_memory.warn_if_short(8, 50_000_000, tmp_path)
    assert capsys.readouterr().err == ""
    free(64_000_000)  # what Docker gives
    shared_memory.warn_if_short(8, 50_000_000, tmp_path)
    message = capsys.readouterr().err
    assert "need about 1.8 GB there; 0.064 GB is free" in message
    assert f"remount,size=2G {tmp_path}" in message
    assert "data.num_workers=0" in message


def test_reading_processes_ask_for_shared_memory(config, monkeypatch):
    asked = []
    monkeypatch.setattr(shared_memory, "warn_if_short", lambda *args: asked.append(args))
    train_batches(config, batch_size=4, seed=0)
    several = dataclasses.replace(config, num_workers=3)
    train_batches(several, batch_size=4, seed=0, process_count=2)
    assert asked == [(3, 2 * 32 * 64 * 64 * 3)]


def test_reading_processes_leave_the_terminal_to_the_run(config):
    """A terminal that closes, or Ctrl-C, signals every process of the run."""
    batches = train_batches(dataclasses.replace(config, num_workers=1), batch_size=4, seed=3)
    first = next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(worker.pid, number)
    for _ in range(8):
        assert next(batches)["frames"].shape == first["frames"].shape
    assert all(worker.is_alive() for worker in multiprocessing.active_children())
    batches.close()


def test_rollouts_of_fewer_episodes_where_there_are_no_more(make_data, capsys):
    config = DataConfig(num_workers=0, dir=str(make_data(val=[[40, 20]])))
    sizes = dict(frames=30, n_prompt=4, num_actions=NUM_ACTIONS)
    script = rollouts.write_script(config, "val", count=4, **sizes)
    assert script.real.shape[:2] == (1, 30)
    assert "1 records of 30 frames" in capsys.readouterr().err
    script = rollouts.write_script(config, "val", count=4, source="random", **sizes)
    assert (script.real, script.prompt.shape[:2]) == (None, (2, 4))
    with pytest.raises(UserError, match="0 episodes"):
        rollouts.write_script(config, "val", count=0, **sizes)


def test_data_of_a_game_of_more_actions_names_the_setting(make_data):
    folder = make_data(train=[[40]])
    (folder / "metadata.json").write_text('{"env": "ALE/Pong-v5", "num_actions": 18}')
    config = DataConfig(num_workers=0, dir=str(folder))
    with pytest.raises(UserError, match=r"--config\.model\.num_actions=18 "):
        open_episodes(config, "train")
    assert len(open_episodes(config, "train", num_actions=18)) == 1
    with pytest.raises(UserError, match="has 18 actions, and the model has 20 actions"):
        open_episodes(config, "train", num_actions=20)
