"""The Gymnasium environment: the library's own checks, seeds, resets of worlds, bad input."""

import dataclasses
import functools

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tiny_network import TINY

import cwm_jax.environment
from cwm_jax.checkpoints import weights
from cwm_jax.environment import display, options
from cwm_jax.environment.vector import CoinRunVectorEnv
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.world_model import WorldModel

ID = cwm_jax.environment.ID


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(heads): a tiny model's file; its heads differ between frames."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(heads):
        network = dataclasses.replace(TINY, depth=1, heads=heads)
        params = dit.init(network, 0)
        keys = jax.random.split(jax.random.key(1), len(params))
        large = lambda name: 3.0 if name.startswith(("heads.end", "heads.reward")) else 0.1
        params = {
            name: leaf + large(name) * jax.random.normal(key, leaf.shape)
            for key, (name, leaf) in zip(keys, params.items(), strict=True)
        }
        path = folder / f"heads_{heads}.safetensors"
        model = dataclasses.asdict(network)
        weights.write(path, params, {"step": 1, "config": {"model": model, "ddim_steps": 1}})
        return path

    return make


@pytest.fixture
def vector(checkpoint):
    return lambda **given: CoinRunVectorEnv(3, checkpoint=checkpoint(True), **given)


def test_gymnasium_finds_nothing_wrong(checkpoint):
    env = gymnasium.make(ID, checkpoint=checkpoint(True), render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.observation_space.shape == (64, 64, 3)
    assert env.action_space == gymnasium.spaces.Discrete(15)


def test_episodes_are_truncated_at_gymnasiums_limit(checkpoint):
    env = gymnasium.make(ID, checkpoint=checkpoint(True), rewards=False, max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]
    envs = gymnasium.make_vec(
        ID,
        num_envs=3,
        vectorization_mode="vector_entry_point",
        checkpoint=checkpoint(True),
        rewards=False,
        max_episode_steps=3,
    )
    envs.reset(seed=0)
    cut = [envs.step(np.zeros(3, int))[3].tolist() for _ in range(5)]
    assert cut == [[False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3]


def played(envs, steps=9, seed=4):
    """What `steps` steps with random actions give, and the observations."""
    rng = np.random.default_rng(0)
    frames, found = [envs.reset(seed=seed)[0]], []
    for _ in range(steps):
        frame, *rest = envs.step(rng.integers(15, size=3))
        frames.append(frame)
        found.append(rest)
    return np.array(frames), found


def test_seeds_reproduce_and_differ(vector):
    envs = vector()
    frames, found = played(envs)
    again, found_again = played(envs)
    np.testing.assert_array_equal(frames, again)
    for one, two in zip(found, found_again, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
    assert (played(envs, seed=7)[0] != frames).any()
    first = envs.reset(seed=4)[0]
    np.testing.assert_array_equal(first[1:], envs.reset(seed=5)[0][:2])  # world i: seed + i


def test_rewards_and_ends_are_those_of_the_heads(vector):
    envs = vector(reward_scale=3, threshold=0.6)
    _, found = played(envs, steps=40)
    rewards, ends = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    probabilities = lambda name: np.array([f[3][name] for f in found])
    assert set(np.unique(rewards)) <= {-3.0, 0.0, 3.0}
    np.testing.assert_array_equal(rewards == 3, probabilities("reward_probability") >= 0.6)
    np.testing.assert_array_equal(ends, probabilities("end_probability") >= 0.6)
    assert ends.any()
    assert not ends.all()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_worlds_restart_by_the_mode(vector, monkeypatch, mode):
    envs = vector(autoreset_mode=mode, max_episode_steps=50)
    ending = iter([[False, True, False]] + [[False] * 3] * 9)
    earned = lambda counts: (np.ones(3), np.array(next(ending)) & counts, {})
    monkeypatch.setattr(envs, "_earned", earned)
    envs.reset(seed=0)
    begun = []
    monkeypatch.setattr(
        envs.world, "reset", lambda **how: begun.append(how["where"]) or envs.world.frames
    )
    frames, _, ends, _, infos = envs.step(np.zeros(3, int))
    assert ends.tolist() == [False, True, False]
    if mode == AutoresetMode.SAME_STEP:
        assert begun[0].tolist() == [False, True, False]
        assert infos["_final_obs"].tolist() == [False, True, False]
        assert infos["final_obs"][1].shape == frames[1].shape
        return
    assert not begun
    if mode == AutoresetMode.DISABLED:
        with pytest.raises(UserError, match="world 1: its episode is over"):
            envs.step(np.zeros(3, int))
        envs.reset(options={"reset_mask": np.array([False, True, False])})
    envs.step(np.zeros(3, int))
    assert [mask.tolist() for mask in begun] == [[False, True, False]]
    envs.step(np.zeros(3, int))
    assert len(begun) == 1


def test_a_world_that_begins_anew_does_not_change_the_others(vector):
    envs = vector(rewards=False)
    steps = np.random.default_rng(0).integers(15, size=(6, 3))
    envs.reset(seed=0)
    undisturbed = [envs.step(a)[0] for a in steps]
    envs.reset(seed=0)
    for i, actions in enumerate(steps):
        if i == 3:
            envs.reset(options={"reset_mask": np.array([False, True, False])})
        frame = envs.step(actions)[0]
        np.testing.assert_array_equal(frame[[0, 2]], undisturbed[i][[0, 2]])
    assert (frame[1] != undisturbed[-1][1]).any()


def test_a_prompt_can_be_given(checkpoint):
    env = gymnasium.make(ID, checkpoint=checkpoint(True), rewards=False)
    frames = np.random.default_rng(0).integers(256, size=(3, 64, 64, 3), dtype=np.uint8)
    first, _ = env.reset(options={"frames": frames, "actions": np.array([-1, 7, 7])})
    np.testing.assert_array_equal(first, frames[-1])
    frames_again = np.roll(frames, 1, axis=0)
    assert (env.reset(options={"frames": frames_again[:1]})[0] == frames_again[0]).all()


def test_environments_may_share_a_model(checkpoint):
    """None changes another's worlds, nor those of the model that was given."""
    model = WorldModel.from_pretrained(checkpoint(True))
    before = model.reset(batch=3, seed=1)
    actions = np.random.default_rng(0).integers(15, size=(4, 2))
    make = functools.partial(gymnasium.make, ID, checkpoint=model, rewards=False)
    alone = []
    for i in range(2):
        env = make()
        alone.append([env.reset(seed=4 + i)[0], *(env.step(a)[0] for a in actions[:, i])])
    envs = make(), make()
    in_turn = [[env.reset(seed=4 + i)[0] for i, env in enumerate(envs)]]
    in_turn += [[env.step(a)[0] for env, a in zip(envs, pair, strict=True)] for pair in actions]
    np.testing.assert_array_equal(np.swapaxes(in_turn, 0, 1), alone)
    several = gymnasium.make_vec(
        ID, num_envs=2, vectorization_mode="sync", checkpoint=model, rewards=False
    )
    found = [several.reset(seed=4)[0], *(several.step(pair)[0].copy() for pair in actions)]
    np.testing.assert_array_equal(np.swapaxes(found, 0, 1), alone)
    np.testing.assert_array_equal(model.frames, before)


def test_options_differ_from_those_of_a_given_model(checkpoint, make_data):
    model = WorldModel.from_pretrained(checkpoint(True))
    data = make_data(val=[[40]])
    env = gymnasium.make(ID, checkpoint=model, denoising_steps=3, data=data).unwrapped
    assert (env.world.denoising_steps, model.denoising_steps) == (3, 1)
    assert not env.reset(seed=0)[0][1:].any()  # a marked episode has no other pixels


def test_frames_are_shown_in_a_window(checkpoint, monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gymnasium.make(ID, checkpoint=checkpoint(True), rewards=False, render_mode="human")
    env.reset(seed=0)
    frame = env.step(7)[0]
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(shown[:: options.SCALE, :: options.SCALE], frame)
    env.close()
    display.Display("closed twice", 15).close()


def test_bad_input_is_named(checkpoint, vector):
    with_heads = checkpoint(True)
    for given, fault in (
        (dict(checkpoint=with_heads, colour="red"), "no option 'colour' .* threshold"),
        (dict(checkpoint=checkpoint(False)), "has no heads.*heads=True.*rewards=False"),
        (dict(checkpoint="nowhere"), "nowhere"),
        (dict(checkpoint=with_heads, threshold=2), "threshold=2: must be a number 0…1"),
        (dict(checkpoint=with_heads, render_mode="ansi"), "'ansi': must be rgb_array"),
        (dict(checkpoint=3), "checkpoint=3: must be a path"),
    ):
        with pytest.raises(UserError, match=fault):
            gymnasium.make(ID, disable_env_checker=True, **given)
    model = WorldModel.from_pretrained(with_heads)
    for given, fault in (
        (dict(prompt_frames=0), "prompt_frames=0: must be an integer, 1…5"),
        (dict(prompt_frames=6), "prompt_frames=6: must be an integer, 1…5"),
        (dict(denoising_steps=0), "denoising_steps=0: must be an integer, 1…1000"),
        (dict(data="nope"), "data folder nope does not exist"),
    ):
        for make in (functools.partial(gymnasium.make, ID), CoinRunVectorEnv):
            for one in (with_heads, model):
                with pytest.raises(UserError, match=fault):
                    make(checkpoint=one, **given)
    env = gymnasium.make(ID, checkpoint=with_heads).unwrapped
    with pytest.raises(UserError, match="before reset"):
        env.step(0)
    env.reset()
    with pytest.raises(UserError, match=r"action 15: actions are 0…14"):
        env.step(15)
    with pytest.raises(UserError, match=r"action=\[1, 2\]: must be one of Discrete\(15\)"):
        env.step([1, 2])
    with pytest.raises(UserError, match="options=3: must be a dict"):
        env.reset(options=3)
    with pytest.raises(UserError, match="no option 'level' of reset; valid are frames, actions"):
        env.reset(options={"level": 3})
    for given, fault in (
        (dict(num_envs=0), "num_envs=0"),
        (dict(max_episode_steps="a"), "max_episode_steps='a': must be an integer"),
        (dict(num_envs=2, autoreset_mode="sometimes"), "'sometimes': must be one of NextStep"),
    ):
        with pytest.raises(UserError, match=fault):
            CoinRunVectorEnv(checkpoint=with_heads, **given)
    envs = vector()
    envs.reset()
    with pytest.raises(UserError, match="one for each of the 3 worlds"):
        envs.step(np.zeros(2, int))
    with pytest.raises(UserError, match="2 seeds for 3 worlds"):
        envs.reset(seed=[1, 2])
    with pytest.raises(UserError, match=r"seed=1\.5: must be an integer"):
        envs.reset(seed=1.5)
    with pytest.raises(UserError, match="reset_mask: expected 3 booleans"):
        envs.reset(options={"reset_mask": [1, 0, 0]})


def test_outcomes_are_predicted_and_missing_heads_reported(checkpoint):
    world = WorldModel.from_pretrained(checkpoint(True))
    world.reset(batch=3)
    with pytest.raises(UserError, match=r"call step\(\) first"):
        _ = world.outcomes
    world.step([7, 7, 1])
    assert world.outcomes.end.shape == (3, 1)
    world = WorldModel.from_pretrained(checkpoint(False))
    with pytest.raises(UserError, match="has no heads"):
        _ = world.outcomes
