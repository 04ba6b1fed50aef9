"""The training step: learning rate, average, noise, and devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import of_one_block

from cwm_jax.errors import UserError
from cwm_jax.training import examples, train_step
from cwm_jax.training.config import ComputeConfig, ExampleConfig, OptimizerConfig
from cwm_jax.training.train_step import TrainSetup

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def small(tiny):
    """With one block: what an update does with gradients is the same for any network."""
    return dataclasses.replace(tiny, depth=1)


@pytest.fixture(scope="module")
def params(tiny, tiny_params):
    return of_one_block(tiny, tiny_params)[1]


def settings(**changes):
    defaults = dict(lr=1e-3, weight_decay=0.01, warmup_steps=0, grad_clip=1.0, ema_decay=0.0)
    return OptimizerConfig(**(defaults | changes))


def batch_of(clips, frames=3):
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 15, (clips, frames), np.int32)
    actions[:, 0] = -1
    pixels = rng.integers(0, 256, (clips, 1, 64, 64, 3), np.uint8)
    return {"frames": np.repeat(pixels, frames, axis=1), "actions": actions}


def run(small, optim, steps, batch=None):
    state = train_step.init_state(small, optim, 0)
    losses = []
    for _ in range(steps):
        state, metrics = train_step.train_step(
            state, batch or batch_of(2), KEY, TrainSetup(network=small, optim=optim)
        )
        losses.append(float(metrics["train/loss"]))
    return state, losses


def test_warm_up():
    rate = train_step.learning_rate(settings(lr=2e-3, warmup_steps=5))
    expected = [2e-3 * (1 / 5 + (1 - 1 / 5) * min(k / 5, 1)) for k in range(8)]
    np.testing.assert_allclose([float(rate(k)) for k in range(8)], expected, rtol=1e-6)
    assert float(train_step.learning_rate(settings())(0)) == pytest.approx(1e-3)


def test_warm_up_keeps_its_first_digits():
    rate = train_step.learning_rate(settings(lr=1e-3, warmup_steps=2000))
    assert float(rate(jnp.int32(0))) == pytest.approx(5e-7, rel=1e-6)


def test_the_rate_falls_to_nothing_at_the_end():
    rate = train_step.learning_rate(settings(lr=1e-3, warmup_steps=2, decay_steps=4), 10)
    expected = [0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    np.testing.assert_allclose([float(rate(k)) for k in range(11)], 1e-3 * np.array(expected))
    short = train_step.learning_rate(settings(lr=1e-3, decay_steps=4), 2)
    np.testing.assert_allclose([float(short(k)) for k in range(3)], [1e-3, 5e-4, 0])


def test_a_rate_multiplies_an_update_without_compilation(small):
    optim, before = settings(lr=1e-2), train_step.train_step._cache_size()
    setup, moved = TrainSetup(network=small, optim=optim), {}
    for rate in (1.0, 0.25, 0.0):
        state = train_step.init_state(small, optim, 0)
        start = jax.tree.map(jnp.copy, state.params)
        state, metrics = train_step.train_step(
            state, batch_of(2), KEY, setup, rate=np.float32(rate)
        )
        assert float(metrics["train/lr"]) == pytest.approx(rate * 1e-2)
        moved[rate] = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, start)
    assert train_step.train_step._cache_size() == before + 1
    for name, whole in moved[1.0].items():
        np.testing.assert_allclose(moved[0.25][name], 0.25 * whole, rtol=1e-3, atol=1e-6)
        assert not moved[0.0][name].any()


def test_it_learns_and_compiles_once(small):
    before = train_step.train_step._cache_size()
    white = batch_of(2) | {"frames": np.full((2, 3, 64, 64, 3), 255, np.uint8)}
    state, losses = run(small, settings(lr=1e-2), 40, white)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert train_step.train_step._cache_size() == before + 1
    assert int(state.step) == 40
    np.testing.assert_allclose(state.epoch_loss, [sum(losses), 40], rtol=1e-5)


def test_noise_depends_on_the_step_alone(small):
    """Two runs agree bit by bit, and a step done again from its state is the same step."""
    optim = settings(ema_decay=0.9)
    first, losses = run(small, optim, 4)
    second, again = run(small, optim, 4)
    assert losses == again
    assert len(set(losses)) == 4
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))


@pytest.mark.parametrize("how", [dict(remat="gelu_norm"), dict(remat="layer", accumulate_steps=2)])
def test_how_a_step_is_computed_does_not_change_it(small, params, how):
    example = examples.make(KEY, batch_of(4), ExampleConfig())
    gradients = jax.jit(train_step.gradients, static_argnames="setup")
    setup = TrainSetup(network=small, optim=settings())
    found = [
        gradients(params, example, dataclasses.replace(setup, compute=step))
        for step in (ComputeConfig(), ComputeConfig(**how))
    ]
    (loss, plain), (other_loss, other) = found
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in plain.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(other[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_a_step_reuses_the_buffers_of_the_state(small):
    optim = settings(ema_decay=0.9)
    state = jax.eval_shape(lambda: train_step.init_state(small, optim, 0))
    lowered = train_step.train_step.lower(
        state, batch_of(2), KEY, TrainSetup(network=small, optim=optim)
    )
    (given, batch, key), _ = lowered.args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(given))
    assert not any(leaf.donated for leaf in jax.tree.leaves((batch, key)))


def test_gradients_are_float32_whatever_the_matmuls(small):
    network = dataclasses.replace(small, dtype="bfloat16")
    state = jax.eval_shape(lambda: train_step.init_state(network, settings(), 0))
    example = jax.eval_shape(lambda: examples.make(KEY, batch_of(2), ExampleConfig()))
    setup = TrainSetup(network=network, optim=settings())
    function = functools.partial(train_step.gradients, setup=setup)
    _, grads = jax.eval_shape(function, state.params, example)
    assert {leaf.dtype for leaf in grads.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("wrong", [dict(remat="all"), dict(accumulate_steps=0)])
def test_an_unknown_compute_setting_is_named(wrong):
    with pytest.raises(UserError, match=f"config.compute.{next(iter(wrong))}"):
        ComputeConfig(**wrong)


def test_moving_average(small):
    optim = settings(ema_decay=0.9)
    state = train_step.init_state(small, optim, 0)
    expected = jax.tree.map(np.asarray, state.params)
    for k in range(3):
        setup = TrainSetup(network=small, optim=optim)
        state, _ = train_step.train_step(state, batch_of(2), KEY, setup)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = {n: decay * v + (1 - decay) * state.params[n] for n, v in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(state.ema[name], value, rtol=1e-4, atol=1e-7)
    assert train_step.weights_to_sample(state) is state.ema
    assert train_step.weights_to_sample(state._replace(ema=None)) is state.params


def test_decay_reaches_every_parameter(small):
    optim = settings(lr=0.1, weight_decay=0.5)
    state = train_step.init_state(small, optim, 0)
    ones = jax.tree.map(jnp.ones_like, state.params)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(train_step.optimizer(optim).update)(zeros, state.opt_state, ones)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.05, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"grad_clip": 0.0}, {"ema_decay": 1.0}])
def test_values_out_of_range_are_named(change):
    with pytest.raises(UserError, match=f"config.optimizer.{next(iter(change))}"):
        settings(**change)


def test_an_update_that_is_not_finite_is_skipped(small):
    """Only the two counters change, and the next step is as without it."""
    optim = settings(ema_decay=0.9)
    state, _ = run(small, optim, 2)
    before = jax.tree.map(np.array, state)
    setup = TrainSetup(network=small, optim=optim)
    poisoned = batch_of(2) | {"frames": np.full((2, 3, 64, 64, 3), np.nan, np.float32)}
    state, metrics = train_step.train_step(state, poisoned, KEY, setup)
    assert np.isnan(metrics["train/loss"])
    assert int(metrics["train/skipped"]) == 1
    expected = before._replace(step=np.int32(3), skipped=np.int32(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, expected))
    state, metrics = train_step.train_step(state, batch_of(2), KEY, setup)
    assert np.isfinite(metrics["train/loss"])
    assert int(state.opt_state[1][0].count) == 3
    assert int(metrics["train/skipped"]) == 1
