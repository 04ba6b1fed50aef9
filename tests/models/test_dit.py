"""The network: its size, causality, and initialisation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug, large, pocket, small
from cwm_jax.diffusion import denoiser
from cwm_jax.errors import UserError
from cwm_jax.models import attention, dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.training import objective
from cwm_jax.training.examples import Example


def forward(config, params, *args):
    return jax.jit(lambda params, *args: denoiser.bind(config, params)(*args))(params, *args)


def clip(config, batch=2, frames=5, seed=0):
    """Random frames, noise levels and actions."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = batch, frames
    return (
        jax.random.normal(keys[0], (*shape, config.image_size, config.image_size, 3)),
        jax.random.randint(keys[1], shape, 0, 1000),
        jax.random.randint(keys[2], shape, -1, config.num_actions),
    )


@pytest.mark.parametrize(
    ("config", "count"),
    [(small, 57_821_888), (large, 119_739_712), (debug, 5_352_741), (pocket, 10_181_925)],
)
def test_the_published_sizes(config, count):
    network = DiTConfig(**config.get_config().model)
    assert dit.parameter_count(dit.shapes(network)) == count


def test_no_frame_depends_on_a_later_one(tiny, tiny_params):
    frames, t, actions = clip(tiny, batch=1)

    def output_of(frame, frames):
        return jnp.square(denoiser.bind(tiny, tiny_params)(frames, t, actions)[0, frame]).sum()

    influence = jax.jit(jax.vmap(jax.grad(output_of, argnums=1), in_axes=(0, None)))
    gradients = np.abs(influence(jnp.arange(5), frames)[:, 0]).sum((2, 3, 4))  # [output, input]
    assert (np.triu(gradients, 1) == 0).all()
    assert (np.tril(gradients) + np.triu(np.ones((5, 5)), 1) > 0).all()


def test_every_pixel_of_a_frame_depends_on_every_other(tiny, tiny_params):
    frames, t, actions = clip(tiny, batch=1, frames=1)
    corner = lambda x: jnp.square(denoiser.bind(tiny, tiny_params)(x, t, actions)[0, 0, 0, 0]).sum()
    assert (np.abs(jax.jit(jax.grad(corner))(frames)) > 0).all()


def test_noise_levels_and_actions_influence_their_own_and_later_frames(tiny, tiny_params):
    frames, t, actions = clip(tiny)
    before = forward(tiny, tiny_params, frames, t, actions)
    for changed in (
        forward(tiny, tiny_params, frames, t.at[:, 3].add(7), actions),
        forward(tiny, tiny_params, frames, t, actions.at[:, 3].set((actions[:, 3] + 2) % 15)),
    ):
        moved = np.abs(changed - before).max((0, 2, 3, 4))
        assert (moved[:3] == 0).all()
        assert (moved[3:] > 1e-4).all()


def test_no_action_is_the_zero_vector(tiny, tiny_params):
    """−1 must not index the last action, nor count as the first."""
    frames, t, _ = clip(tiny, frames=1)
    forward_with = lambda action: forward(tiny, tiny_params, frames, t, jnp.full((2, 1), action))
    silent = tiny_params | {"action.kernel": jnp.zeros_like(tiny_params["action.kernel"])}
    none = forward(tiny, silent, frames, t, jnp.full((2, 1), 4))
    np.testing.assert_allclose(forward_with(-1), none, atol=1e-6)
    assert np.abs(forward_with(14) - none).max() > 1e-4


def test_a_fresh_network_predicts_zero(tiny):
    assert (forward(tiny, dit.init(tiny, 0), *clip(tiny)) == 0).all()


def test_initial_weights(tiny):
    params = dit.init(tiny, 0)
    for name, leaf in params.items():
        if "modulation" in name or name.startswith("patch_out") or name.endswith("bias"):
            assert (leaf == 0).all(), name
        elif name.startswith("time"):
            assert np.std(leaf) == pytest.approx(0.02, rel=0.1), name
        else:
            bound = np.sqrt(6 / sum(leaf.shape))
            assert 0.9 * bound < np.abs(leaf).max() <= bound, name
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())


def test_bfloat16_is_near_float32(tiny, tiny_params):
    fast = dataclasses.replace(tiny, dtype="bfloat16")
    args = clip(tiny)
    exact = np.asarray(forward(tiny, tiny_params, *args))
    rough = np.asarray(forward(fast, tiny_params, *args))
    assert rough.dtype == np.float32
    error = np.square(rough - exact).mean() / np.square(exact).mean()
    assert 0 < error < 2e-3


@pytest.mark.parametrize("change", [{}, {"history": 2, "warp_reach": 4}])
def test_float32_means_float32_on_every_device(tiny, change):
    """By default, a GPU multiplies float32 numbers in TF32, with ten bits."""
    network = dataclasses.replace(tiny, **change)
    frames = jax.ShapeDtypeStruct((2, 4, 64, 64, 3), jnp.uint8)
    levels = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    noise = jax.ShapeDtypeStruct(frames.shape, jnp.float32)
    loss = functools.partial(objective.clip_loss, network=network)
    example = Example(frames, levels, levels, noise)
    lowered = jax.jit(jax.grad(loss)).lower(dit.shapes(network), example)
    products = re.findall(r"stablehlo.dot_general.*", lowered.as_text())
    assert len(products) > 20
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "hidden_size=100"),
        ({"patch_size": 7}, "patch_size=7"),
        ({"dtype": "float16"}, "float16"),
        ({"depth": 0}, "depth"),
        ({"num_heads": 2.0}, "num_heads"),
    ],
)
def test_invalid_sizes_are_refused(tiny, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny, **change)


def test_a_kernel_that_this_device_lacks_is_reported():
    with pytest.raises(UserError, match=r"config.model.attention=cudnn needs an NVIDIA GPU"):
        attention.check_device("cudnn", "xla")
    with pytest.raises(UserError, match=r"config.model.time_attention=fused needs an NVIDIA GPU"):
        attention.check_device("xla", "fused")
    attention.check_device("auto", "xla")


def test_foreign_parameters_are_named(tiny):
    shapes = dit.shapes(tiny)
    with pytest.raises(UserError, match=r"patch_in\.kernel"):
        dit.check_params(tiny, {k: v for k, v in shapes.items() if k != "patch_in.kernel"})
    wrong = shapes | {"patch_in.bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(UserError, match=r"patch_in\.bias has shape \(3,\)"):
        dit.check_params(tiny, wrong)
