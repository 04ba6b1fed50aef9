"""The short form of the fault campaign, and hostile records that hypothesis thinks of."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.data.records import BadRecord, Episode, decode, encode
from tests.faults import campaign, life
from tests.faults.arena import Arena, Skipped

SHORT = ("kill_9", "asked_to_stop", "disk_full", "loss_not_finite", "worker_killed")


@pytest.mark.timeout(600)
def test_runs_survive_one_fault_of_each_kind(tmp_path):
    """`make faults` does many more, and more kinds."""
    life.get_ready()
    arena = Arena(tmp_path)
    arena.reference()

    def attempt(number_and_name):
        number, name = number_and_name
        try:
            return campaign.FAULTS[name](arena, random.Random(number))
        except Skipped as why:
            print(f"{name} skipped: {why}")
            return None

    with ThreadPoolExecutor(2) as pool:
        trials = [trial for trial in pool.map(attempt, enumerate(SHORT)) if trial]
    assert not [fault for trial in trials for fault in trial.faults], trials
    assert sum(trial.times for trial in trials) >= len(trials) - 1  # a kill may come too late


EPISODE = Episode(
    np.arange(2 * 64 * 64 * 3).reshape(2, *FRAME_SHAPE).astype(np.uint8),
    np.array([3, 14], np.int32),
)
RECORDS = [encode(EPISODE)] + [
    pickle.dumps({"raw_video": b"", "sequence_length": 1, "actions": np.arange(3)}, protocol)
    for protocol in (3, 4, 5)
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_record_with_bytes_changed_is_an_episode_or_a_bad_record(data):
    raw = bytearray(data.draw(st.sampled_from(RECORDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.one_of(st.integers(0, 120), st.integers(-200, -1)))
        piece = data.draw(st.binary(max_size=9))
        raw[place : place + data.draw(st.integers(0, 9))] = piece
    try:
        episode = decode(bytes(raw))
    except BadRecord:
        return
    assert len(episode.frames) == len(episode.actions)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([bytes([c]) for c in range(256)]) | st.binary(max_size=5)))
def test_no_bytes_at_all_do_more_than_be_refused(pieces):
    with pytest.raises(BadRecord):
        decode(b"\x80\x04" + b"".join(pieces) + b".")
