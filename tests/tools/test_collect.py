"""Recording: real levels of the real game, and a folder that survives being broken off."""

import itertools
import json
import pickle
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from cwm_jax import controls
from cwm_jax.data import records as records_module
from cwm_jax.data import shards
from cwm_jax.errors import UserError
from cwm_jax.simulator import game, venv
from cwm_jax.tools import collect

ENVIRONMENT = Path(__file__).parents[2] / ".venv-procgen"
real_game = pytest.mark.skipif(
    not venv.is_ready(ENVIRONMENT), reason="no simulator here: make install-procgen"
)


def recipe(**changed):
    settings = dict(
        game="coinrun",
        policy={"random": 1.0},
        difficulty="hard",
        seed=5,
        records={"train": 5, "val": 2, "test": 0},
        records_per_shard=2,
        chunk=40,
        min_chunk=7,
    )
    return collect.Recipe(**settings | changed)


def records(folder, split):
    for shard in sorted((folder / split).glob("*.array_record")):
        reader = shards.open_shard(shard)
        for index in range(reader.num_records()):
            yield shards.read_record(reader, shard, index)


class FakeSimulator:
    """Plays immediately, and fails at the given recording."""

    fails_at: ClassVar = None
    played: ClassVar = []

    def __init__(self, python):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record(self, recording):
        self.played.append(tuple(recording.seed))
        for i in range(recording.records):
            if (len(self.played), i) == self.fails_at:
                raise UserError("the simulator's process ended")
            level = recording.first_level + i
            frames = np.full((recording.chunk, 64, 64, 3), level % 251, np.uint8)
            actions = np.arange(recording.chunk, dtype=np.int32) % 15
            zeros = np.zeros(recording.chunk)
            episode = records_module.Episode(frames, actions)
            yield game.Chunk(episode, zeros.astype(np.float32), zeros.astype(bool), level, 0)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(game, "Simulator", FakeSimulator)
    monkeypatch.setattr(FakeSimulator, "played", [])
    monkeypatch.setattr(FakeSimulator, "fails_at", None)
    return FakeSimulator


def test_missing_records_are_added_and_existing_ones_kept(tmp_path, fake, monkeypatch):
    run = lambda: collect.collect(tmp_path / "data", recipe(), python=Path(), jobs=1)
    monkeypatch.setattr(fake, "fails_at", (2, 1))
    with pytest.raises(UserError, match="ended"):
        run()
    names = lambda: sorted(p.name for p in tmp_path.rglob("*.array_record"))
    assert names() == ["data_0000.array_record"]  # the shard in work left nothing
    assert json.loads((tmp_path / "data/metadata.json").read_text())["splits"]["train"] == {
        "records": 2,
        "wanted": 5,
        "frames": 80,
        "lengths": {"40": 2},
        "action_histogram": [6] * 10 + [4] * 5,
        "level_seeds": [0, collect.LEVELS - 1],
    }
    first = (tmp_path / "data/train/data_0000.array_record").read_bytes()
    monkeypatch.setattr(fake, "fails_at", None)
    fake.played.clear()
    run()
    assert [seed[2] for seed in fake.played] == [1, 2, 0]
    assert (tmp_path / "data/train/data_0000.array_record").read_bytes() == first
    assert len(list(records(tmp_path / "data", "train"))) == 5
    fake.played.clear()
    run()
    assert not fake.played
    (tmp_path / "data/val/data_0000.array_record").unlink()
    run()
    assert len(fake.played) == 1


def test_another_recipe_or_a_strange_folder_is_refused(tmp_path, fake):
    make = lambda **changed: collect.collect(
        tmp_path / "data", recipe(**changed), python=Path(), jobs=2
    )
    make()
    with pytest.raises(UserError, match="seed=5, not 6"):
        make(seed=6)
    (tmp_path / "data/metadata.json").unlink()
    with pytest.raises(UserError, match="contains other files"):
        make()


def test_more_records_are_added_to_those_that_are_there(tmp_path, fake):
    """Whole shards stay; one that was a rest is made anew, as all would be from the beginning."""
    make = lambda folder, train: collect.collect(
        tmp_path / folder,
        recipe(records={"train": train, "val": 2, "test": 0}),
        python=Path(),
        jobs=2,
    )
    make("grown", 5)
    fake.played.clear()
    make("grown", 8)
    assert sorted(seed[2] for seed in fake.played) == [2, 3]
    make("at_once", 8)
    for number in range(4):
        name = f"train/data_{number:04d}.array_record"
        assert (tmp_path / "grown" / name).read_bytes() == (
            tmp_path / "at_once" / name
        ).read_bytes()
    with pytest.raises(UserError, match="records="):
        make("grown", 5)


@pytest.mark.parametrize("text", ["", "best", "random=-1", "random,sticky=x", "random=0"])
def test_a_policy_must_be_known_and_weighted(text):
    with pytest.raises(UserError, match="--policy"):
        collect.parse_policy(text)


def test_mixes_are_read():
    assert collect.parse_policy("random=1,sticky=3") == {"random": 1, "sticky": 3}


def test_recipes_are_checked():
    for field, value in (("game", "pong"), ("chunk", 3), ("records_per_shard", 0)):
        with pytest.raises(UserError):
            recipe(**{field: value})


SHORT_GAME = """
import runpy, sys, types
import numpy as np

class Short:
    def __init__(self, num, **_):
        self.num, self.steps = num, 0

    def observe(self):
        ended = np.full(self.num, self.steps and self.steps % 5 == 0)
        return np.zeros(self.num), {"rgb": np.zeros((self.num, 64, 64, 3), np.uint8)}, ended

    def act(self, actions):
        self.steps += 1

    def get_info(self):
        return [{"level_seed": 3}] * self.num

    def close(self):
        pass

sys.modules["procgen"] = types.SimpleNamespace(ProcgenGym3Env=Short)
runpy.run_path(sys.argv[-1], run_name="__main__")
"""


@pytest.fixture
def short_game(tmp_path):
    """A simulator's Python whose every game is over after 5 frames."""
    program, python = tmp_path / "short.py", tmp_path / "python"
    program.write_text(SHORT_GAME)
    python.write_text(f'#!/bin/sh\nexec {sys.executable!r} {str(program)!r} "$@"\n')
    python.chmod(0o755)
    return python


def test_episodes_that_are_all_too_short_end_the_recording(tmp_path, short_game):
    make = lambda **changed: collect.collect(
        tmp_path / "data", recipe(**changed), python=short_game, jobs=1
    )
    with pytest.raises(UserError, match=r"1000 episodes of coinrun .* no 7 frames .* 5 at most"):
        make(min_chunk=7)
    assert not list((tmp_path / "data").rglob("*.array_record"))
    with game.Simulator(short_game) as simulator:
        jobs = [recording(min_chunk=n, chunk=43, records=3, num_envs=1) for n in (6, 5)]
        with pytest.raises(UserError, match="lower --min-chunk"):
            list(simulator.record(jobs[0]))
        assert [len(c.episode) for c in simulator.record(jobs[1])] == [5, 5, 5]


@pytest.fixture(scope="module")
def simulator():
    with game.Simulator(venv.ensure(ENVIRONMENT)) as simulator:
        yield simulator


def recording(**changed):
    settings = dict(first_level=1000, num_levels=7, seed=(1, 2), records=11, chunk=43, num_envs=3)
    return game.Recording(**dict(game="coinrun", policy={"random": 1.0}) | settings | changed)


@real_game
def test_levels_played_step_by_step_are_those_of_a_replay(simulator):
    levels, actions = (1003, 1004), np.random.default_rng(0).integers(15, size=(40, 2)).tolist()
    playing = simulator.play("coinrun", levels)
    seen = [next(playing)] + [playing.send(pressed) for pressed in actions]
    with pytest.raises(UserError, match="action 15: coinrun has 0…14"):
        playing.send([0, 15])
    runs = [(level, [a[i] for a in actions]) for i, level in enumerate(levels)]
    for i, run in enumerate(simulator.replay("coinrun", runs)):
        frames = np.array([s.frames[i] for s in seen])
        np.testing.assert_array_equal(frames[: len(run.frames)], run.frames)
        rewards = np.array([s.rewards[i] for s in seen[1:]])
        np.testing.assert_array_equal(rewards[: len(run.rewards)], run.rewards)
        assert seen[-1].over[i] == run.ended


@real_game
def test_a_recorded_level_can_be_played_again(simulator):
    chunks = list(simulator.record(recording()))
    assert len(chunks) == 11
    assert {c.level_seed for c in chunks} <= set(range(1000, 1007))
    begun = [c for c in chunks if c.start == 0]
    runs = [(c.level_seed, c.episode.actions) for c in begun]
    for chunk, again in zip(begun, simulator.replay("coinrun", runs), strict=True):
        size = len(chunk.episode)
        np.testing.assert_array_equal(again.frames[:size], chunk.episode.frames)
        np.testing.assert_array_equal(again.rewards[:size], chunk.rewards)
        assert again.ended == bool(chunk.done[-1])
    follows = [(a, b) for a, b in itertools.pairwise(chunks) if a.level_seed == b.level_seed]
    assert follows or len(begun) < len(chunks)


@real_game
def test_the_same_recording_gives_the_same_chunks_and_another_seed_others(simulator):
    first, same, other = (
        [c.episode.frames.tobytes() for c in simulator.record(recording(records=3, seed=seed))]
        for seed in ((1,), (1,), (2,))
    )
    assert first == same
    assert first != other


@real_game
def test_sticky_players_hold_their_keys_and_run_to_the_right(simulator):
    def play(policy):
        chunks = simulator.record(recording(policy={policy: 1.0}, records=9, chunk=160))
        return [c.episode.actions for c in chunks]

    held = lambda runs: np.mean(np.concatenate([np.diff(a) == 0 for a in runs]))
    right = lambda runs: np.mean(np.isin(np.concatenate(runs), (6, 7, 8)))
    random, sticky = play("random"), play("sticky")
    assert held(random) < 0.15 < 0.75 < held(sticky)
    assert right(random) < 0.3 < 0.5 < right(sticky)


@real_game
def test_a_failing_worker_reports_the_reason(simulator):
    with (
        game.Simulator(venv.ensure(ENVIRONMENT)) as broken,
        pytest.raises(UserError, match="process ended with code -6"),
    ):
        list(broken.record(recording(game="no_such_game")))
    with pytest.raises(UserError, match="action 15"):
        simulator.replay("coinrun", [(3, [1, 15])])


@real_game
def test_the_program_makes_a_folder_that_training_can_read(tmp_path):
    argv = "--game maze --policy random,sticky --train 3 --val 2 --test 2 --chunk 33 --jobs 2"
    folder = tmp_path / "maze"
    extra = ["--output", str(folder), "--environment", str(ENVIRONMENT)]
    collect.main([*argv.split(), "--records-per-shard", "2", *extra])
    assert controls.read(folder).game == "maze"
    seeds = {}
    for split in shards.SPLITS:
        fields = [pickle.loads(record) for record in records(folder, split)]
        seeds[split] = {int(seed) for f in fields for seed in np.unique(f["level_seeds"])}
        for f, record in zip(fields, records(folder, split), strict=True):
            episode = records_module.decode(record)
            assert len(episode) == len(f["rewards"]) == len(f["done"]) == f["sequence_length"]
            assert episode.frames.std() > 0
    assert not seeds["train"] & seeds["val"]
    assert not seeds["train"] & seeds["test"]
    assert not seeds["val"] & seeds["test"]


def test_an_environment_that_is_ready_needs_no_lock(tmp_path):
    """It may be another user's, beside which nothing can be written."""
    folder = tmp_path / ".venv-procgen"
    folder.mkdir()
    (folder / ".installed").write_text(venv.REQUIREMENTS.read_text())
    (tmp_path / ".venv-procgen.lock").mkdir()  # cannot be opened
    assert venv.ensure(folder) == folder / "bin" / "python"


def test_a_proxy_that_pip_cannot_use_is_named_before_it_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:p#ss@127.0.0.1:9")
    with pytest.raises(UserError, match="HTTPS_PROXY is not a proxy address") as error:
        venv.ensure(tmp_path / ".venv-procgen")
    assert "p#ss" not in str(error.value)
