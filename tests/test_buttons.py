"""A pad of buttons: bits of an action are inputs of the network, in all programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling import sampler

TINY = dict(hidden_size=16, depth=1, num_heads=2, patch_size=32, image_size=64, max_frames=3)
PAD = DiTConfig(**TINY, num_actions=3, dtype="float32", action_encoding="buttons")


def test_each_button_is_an_input_of_its_own():
    actions = jnp.array([NO_ACTION, 0, 1, 5, 7])
    wanted = [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]
    np.testing.assert_array_equal(dit.action_vectors(PAD, actions), wanted)
    single = DiTConfig(**TINY, num_actions=3, dtype="float32")
    wanted = [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    actions = jnp.array([NO_ACTION, 0, 2])
    np.testing.assert_array_equal(dit.action_vectors(single, actions), wanted)


def test_a_sampler_takes_every_combination_and_no_other():
    assert PAD.action_values == 8
    rng = np.random.default_rng(1)  # fresh parameters have zero gates, which would hide actions
    params = {
        name: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32)
        for name, leaf in dit.shapes(PAD).items()
    }
    config = sampler.SamplerConfig(levels=(999,), window="cached")
    generator = sampler.Sampler(PAD, params, config)
    start = lambda: generator.start(
        np.zeros((8, 1, 64, 64, 3), np.uint8), np.full((8, 1), NO_ACTION)
    )
    _, frames = generator.step(start(), np.arange(8), jax.random.key(0))
    generated = np.asarray(frames)
    assert len({frame.tobytes() for frame in generated}) == 8
    with pytest.raises(UserError, match=r"actions are 0…7"):
        generator.step(start(), np.arange(1, 9), jax.random.key(0))


@pytest.mark.parametrize("changed", [{"action_encoding": "bits"}, {"num_actions": 9}])
def test_the_setting_is_checked(changed):
    settings = dict(num_actions=3, dtype="float32", action_encoding="buttons") | changed
    with pytest.raises(UserError, match=r"action_encoding|at most 8 buttons"):
        DiTConfig(**TINY, **settings)
