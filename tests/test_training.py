"""The training step: its learning rate, its average, its noise, and where it runs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import training
from cwm_jax.errors import UserError
from cwm_jax.training import OptimizerConfig

KEY = jax.random.key(0)


def settings(**changes):
    defaults = dict(lr=1e-3, weight_decay=0.01, warmup_steps=0, grad_clip=1.0, ema_decay=0.0)
    return OptimizerConfig(**(defaults | changes))


def batch_of(clips, frames=3):
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 15, (clips, frames), np.int32)
    actions[:, 0] = -1
    pixels = rng.integers(0, 256, (clips, 1, 64, 64, 3), np.uint8)
    return {"frames": np.repeat(pixels, frames, axis=1), "actions": actions}


def run(tiny, optim, steps, batch=None):
    state = training.init_state(tiny, optim, 0)
    losses = []
    for _ in range(steps):
        state, metrics = training.train_step(
            state, batch or batch_of(2), KEY, network=tiny, optim=optim
        )
        losses.append(float(metrics["train/loss"]))
    return state, losses


def test_warm_up():
    rate = training.learning_rate(settings(lr=2e-3, warmup_steps=5))
    expected = [2e-3 * (1 / 5 + (1 - 1 / 5) * min(k / 5, 1)) for k in range(8)]
    np.testing.assert_allclose([float(rate(k)) for k in range(8)], expected, rtol=1e-6)
    assert float(training.learning_rate(settings())(0)) == pytest.approx(1e-3)


def test_it_learns_and_compiles_once(tiny):
    before = training.train_step._cache_size()
    white = batch_of(2) | {"frames": np.full((2, 3, 64, 64, 3), 255, np.uint8)}
    state, losses = run(tiny, settings(lr=1e-2), 40, white)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert training.train_step._cache_size() == before + 1
    assert int(state.step) == 40
    np.testing.assert_allclose(state.epoch_loss, [sum(losses), 40], rtol=1e-5)


def test_noise_depends_on_the_step_alone(tiny):
    """Two runs agree bit by bit, and a step done again from its state is the same step."""
    optim = settings(ema_decay=0.9)
    first, losses = run(tiny, optim, 4)
    second, again = run(tiny, optim, 4)
    assert losses == again
    assert len(set(losses)) == 4
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))


def test_moving_average(tiny):
    optim = settings(ema_decay=0.9)
    state = training.init_state(tiny, optim, 0)
    expected = jax.tree.map(np.asarray, state.params)
    for k in range(3):
        state, _ = training.train_step(state, batch_of(2), KEY, network=tiny, optim=optim)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = {n: decay * v + (1 - decay) * state.params[n] for n, v in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(state.ema[name], value, rtol=1e-4, atol=1e-7)
    assert training.weights_to_sample(state) is state.ema
    assert training.weights_to_sample(state._replace(ema=None)) is state.params


def test_decay_reaches_every_parameter(tiny):
    optim = settings(lr=0.1, weight_decay=0.5)
    state = training.init_state(tiny, optim, 0)
    ones = jax.tree.map(jnp.ones_like, state.params)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = training.optimizer(optim).update(zeros, state.opt_state, ones)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.05, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"grad_clip": 0.0}, {"ema_decay": 1.0}])
def test_values_out_of_range_are_named(change):
    with pytest.raises(UserError, match=f"config.{next(iter(change))}"):
        settings(**change)


def test_an_update_that_is_not_finite_is_passed_over(tiny):
    """Nothing but the two counters changes, and the next step is as if it had not been."""
    optim = settings(ema_decay=0.9)
    state, _ = run(tiny, optim, 2)
    before = jax.tree.map(np.array, state)
    poisoned = batch_of(2) | {"frames": np.full((2, 3, 64, 64, 3), np.nan, np.float32)}
    state, metrics = training.train_step(state, poisoned, KEY, network=tiny, optim=optim)
    assert np.isnan(metrics["train/loss"])
    assert int(metrics["train/skipped"]) == 1
    expected = before._replace(step=np.int32(3), skipped=np.int32(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, expected))
    state, metrics = training.train_step(state, batch_of(2), KEY, network=tiny, optim=optim)
    assert np.isfinite(metrics["train/loss"])
    assert int(state.opt_state[1][0].count) == 3
    assert int(metrics["train/skipped"]) == 1


FOUR_DEVICES = """
import json, sys
import jax, numpy as np
sys.path[:0] = ["tests"]
from test_training import *
from conftest import TINY
from cwm_jax import parallel
mesh = parallel.make_mesh()
assert jax.device_count() == int(sys.argv[1])
optim = settings()
state = jax.device_put(training.init_state(TINY, optim, 0), parallel.replicated(mesh))
losses = []
for i in range(3):
    batch = parallel.to_devices(batch_of(4), mesh)
    assert len(batch["frames"].sharding.device_set) == jax.device_count()
    state, metrics = training.train_step(state, batch, KEY, network=TINY, optim=optim, mesh=mesh)
    losses.append(float(metrics["train/loss"]))
assert all(p.sharding.is_fully_replicated for p in state.params.values())
print(json.dumps(losses))
"""


def test_four_devices_train_like_one():
    """The same global batch gives the same losses, however many devices share it."""
    losses = {}
    for devices in (1, 4):
        flag = f"--xla_force_host_platform_device_count={devices}"
        result = subprocess.run(
            [sys.executable, "-c", FOUR_DEVICES, str(devices)],
            env={**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        losses[devices] = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-5)
