"""`WorldModel`: reproducible, batched, each world of its own age, in one compiled step."""

import re
from pathlib import Path

import numpy as np
import pytest

import cwm_jax
from cwm_jax import WorldModel
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.coinrun import NO_ACTION
from cwm_jax.data.starts import Starts
from cwm_jax.errors import UserError
from cwm_jax.play.inference.engine import Engine, Lane
from cwm_jax.sampling import worlds

ACTIONS = np.array([[7, 1, 5, 7, 2, 8, 7], [1, 1, 4, 5, 8, 7, 7]])


@pytest.fixture(scope="module")
def trained(network_of):
    network, params = network_of(0)
    return Trained(network, params, {"sampler": {"ddim_steps": 2}}, 7, None)


@pytest.fixture(scope="module")
def model(trained):
    return WorldModel(trained)


def one_by_one(model, actions_BF):
    return np.stack([model.step(actions_BF[:, f]) for f in range(actions_BF.shape[1])], axis=1)


def test_the_package_offers_it_and_nothing_that_is_not_there():
    assert cwm_jax.WorldModel is WorldModel
    with pytest.raises(AttributeError, match="has no attribute 'WorldModels'"):
        cwm_jax.WorldModels  # noqa: B018


def test_seed_prompt_and_actions_decide_every_frame(model):
    first = model.reset(batch=2, seed=3)
    assert (first.dtype, first.shape, model.batch) == (np.uint8, (2, 64, 64, 3), 2)
    frames = model.rollout(ACTIONS)
    assert (frames.dtype, frames.shape) == (np.uint8, (2, 7, 64, 64, 3))
    np.testing.assert_array_equal(model.frames, frames[:, -1])
    np.testing.assert_array_equal(model.reset(batch=2, seed=3), first)
    np.testing.assert_array_equal(model.rollout(ACTIONS), frames)
    model.reset(seed=[3, 4])
    np.testing.assert_array_equal(model.rollout(ACTIONS), frames)
    model.reset(seed=3)  # step by step it is another program, so another order of sums
    difference = np.abs(one_by_one(model, ACTIONS[:, :3]).astype(int) - frames[:, :3])
    assert difference.max() <= 1
    model.reset(seed=[3, 5])
    other = model.rollout(ACTIONS)
    np.testing.assert_array_equal(other[0], frames[0])
    assert (other[1] != frames[1]).any()


def test_it_starts_from_recorded_frames_of_the_seed(model):
    starts = Starts("assets/coinrun")
    shown = model.reset(batch=2, seed=8)
    for world, seed in enumerate((8, 9)):
        start = starts.at(seed, 4)
        np.testing.assert_array_equal(shown[world], start.frames_PHWC[-1])
        assert start.actions_P[0] == NO_ACTION
    assert len({starts.at(seed, 1).frames_PHWC.tobytes() for seed in range(20)}) > 10
    with pytest.raises(UserError, match="161 frames to start from: the longest episode of"):
        starts.at(0, 161)


def test_it_generates_what_the_page_does(model, trained):
    """The engine of play holds the same memory; lanes are its worlds."""
    engine = Engine(trained.network, trained.params, steps=(2,))
    engine.compile(2, 2)
    start = [Starts("assets/coinrun").at(seed, 4) for seed in (3, 4)]
    memories = [engine.fresh() for _ in start]
    for number in range(4):
        for world, given in enumerate(start):
            frame, action = given.frames_PHWC[number], given.actions_P[number]
            memories[world] = engine.append(memories[world], frame, action)
    model.reset(batch=2, seed=3)
    for number, actions in enumerate(ACTIONS.T, start=4):
        wanted = [Lane(memories[w], actions[w], 3 + w, number) for w in range(2)]
        frames = engine.generate(wanted, 2, 2)
        difference = np.abs(model.step(actions).astype(int) - frames)
        assert difference.max() <= 1  # another program, so another order of sums
        memories = [
            engine.append(m, f, a) for m, f, a in zip(memories, model.frames, actions, strict=True)
        ]


def test_a_fresh_one_has_worlds_of_its_own(model, make_data):
    model.reset(batch=2, seed=3)
    frames = model.rollout(ACTIONS)
    before, compiled = model.reset(batch=2, seed=3), worlds._rollout._cache_size()
    other = model.fresh()
    assert (other.batch, other.generator) == (0, model.generator)
    other.reset(batch=2, seed=9)
    assert (other.rollout(ACTIONS) != frames).any()
    np.testing.assert_array_equal(model.frames, before)
    np.testing.assert_array_equal(model.rollout(ACTIONS), frames)
    assert worlds._rollout._cache_size() == compiled
    other = model.fresh(denoising_steps=1, starts=make_data(val=[[40]]))
    assert (other.denoising_steps, len(other.generator.config.levels)) == (1, 1)
    assert (model.denoising_steps, len(model.generator.config.levels)) == (2, 2)
    assert not other.reset()[0, 1:].any()  # a marked episode has no other pixels
    assert model.reset(seed=0)[0, 1:].any()


def test_worlds_begin_again_one_by_one(model):
    """And the others do not notice, however old each is; nothing is compiled anew."""
    model.reset(batch=2, seed=3)
    frames = one_by_one(model, ACTIONS)
    model.reset(batch=2, seed=3)
    compiled = worlds._rollout._cache_size()
    one_by_one(model, ACTIONS[:, :3])
    shown = model.reset(seed=3, where=[True, False])
    np.testing.assert_array_equal(shown[1], frames[1, 2])
    again = one_by_one(model, np.stack([ACTIONS[0, :4], ACTIONS[1, 3:]]))
    np.testing.assert_array_equal(again, np.stack([frames[0, :4], frames[1, 3:]]))
    one_by_one(model, np.tile(ACTIONS, 2))
    assert worlds._rollout._cache_size() == compiled


def test_a_prompt_may_be_one_picture_for_all_or_one_for_each(model):
    start = Starts("assets/coinrun").at(0, 3)
    model.reset(start.frames_PHWC, start.actions_P, batch=2, seed=[5, 5])
    frames = model.rollout(ACTIONS[[0, 0]])
    np.testing.assert_array_equal(frames[0], frames[1])
    model.reset(np.stack([start.frames_PHWC] * 2), np.stack([start.actions_P] * 2), seed=[5, 5])
    np.testing.assert_array_equal(model.rollout(ACTIONS[[0, 0]]), frames)
    np.testing.assert_array_equal(model.reset(start.frames_PHWC[0])[1], start.frames_PHWC[0])
    assert model.step(7).shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.step([7, 15]), r"action 15: actions are 0…14"),
        (lambda m: m.step([7, -1]), r"action -1: actions are 0…14"),
        (lambda m: m.step([7, 7, 7]), r"actions of shape \(3,\) for 2 worlds: .* each, \[2\]"),
        (lambda m: m.step([0.5, np.nan]), r"actions=\[0.5, nan\]: must be integers 0…14"),
        (lambda m: m.rollout([[7], [7, 8]]), r"actions=\[\[7\], \[7, 8\]\]: must be integers"),
        (lambda m: m.reset(batch=0), r"batch=0: must be an integer, 1 or more"),
        (lambda m: m.reset(batch=True), r"batch=True: must be an integer, 1 or more"),
        (lambda m: m.reset(seed=-1), r"seed=-1: must be an integer, 0…"),
        (lambda m: m.reset(seed="a"), r"seed='a': must be an integer, 0…"),
        (lambda m: m.reset(seed=1.5), r"seed=1.5: must be an integer, 0…"),
        (lambda m: m.reset(seed=[1, 2.5]), r"seed\[1\]=2.5: must be an integer, 0…"),
        (lambda m: m.reset(seed=[1, 2, 3], batch=2), r"seed=\[1, 2, 3\]: 3 seeds for 2 worlds"),
        (lambda m: m.reset(where=[1, 0]), r"where=\[1, 0\]: must be a bool for each world"),
        (lambda m: m.reset(actions=[7]), r"actions without frames"),
        (lambda m: m.reset([[1], [1, 2]]), r"frames=\[\[1\], \[1, 2\]\]: must be uint8 \[64"),
        (
            lambda m: m.reset(np.zeros((2, 64, 64, 3), np.uint8), [7]),
            r"actions of shape \(1,\) for 2 prompt frames: must be integers \[2\] or \[2, 2\]",
        ),
        (lambda m: m.reset(seed=0, where=[True]), r"where has the shape \(1,\).*there are 2"),
        (lambda m: m.reset(np.zeros((2, 64, 64, 3), np.uint8)), r"2 prompt frames without actions"),
        (lambda m: m.reset(np.zeros((64, 64, 3))), r"frames are float64 \(64, 64, 3\): "),
        (lambda m: m.reset(prompt_frames=6), r"prompt_frames=6: must be an integer, 1…5 \(the"),
        (lambda m: m.reset(prompt_frames="a"), r"prompt_frames='a': must be an integer"),
        (lambda m: m.fresh(denoising_steps=0), r"denoising_steps=0: must be an integer, 1…1000"),
        (lambda m: m.fresh(starts=3), r"starts=3: must be the path of a data folder"),
        (lambda m: WorldModel.from_pretrained(3), r"source=3: must be a path, or the name of"),
        (lambda m: WorldModel("runs/a"), r"trained='runs/a': .*from_pretrained"),
        (lambda m: m.reset(np.zeros((3, 1, 64, 64, 3), np.uint8), batch=2), r"prompts of 3 worlds"),
    ],
)
def test_invalid_arguments_are_named_and_change_nothing(model, call, message):
    before = model.reset(batch=2, seed=0)
    with pytest.raises(UserError, match=message):
        call(model)
    np.testing.assert_array_equal(model.frames, before)


def test_nothing_is_generated_before_a_world_begins(trained):
    for call in (lambda m: m.step(7), lambda m: m.rollout(ACTIONS), lambda m: m.frames):
        with pytest.raises(UserError, match=r"no world was started: call reset\(\) first"):
            call(WorldModel(trained))


def test_the_page_about_it_runs_as_it_stands(trained, monkeypatch, tmp_path):
    """All its examples, in order, with a small model in place of the package's own."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    asked = []
    load = lambda path, step: asked.append(path) or trained
    monkeypatch.setattr(formats, "load", load)
    monkeypatch.chdir(tmp_path)
    known = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), known)
    assert asked == [pretrained.FOLDER]
    assert known["video"].shape == (4, 30, 64, 64, 3)
    assert (tmp_path / "four.mp4").stat().st_size > 1000
