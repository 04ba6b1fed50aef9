"""Stages of a run: each update has its stage's settings, whether compiled in advance or not."""

import dataclasses

import jax
import numpy as np
import pytest

from cwm_jax.experiment import stages
from cwm_jax.runtime import sharding
from cwm_jax.training import train_step
from cwm_jax.training.config import ExampleConfig

OPTIM = train_step.OptimizerConfig(
    lr=1e-2, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0
)
NOISES = [(0.0, ExampleConfig()), (0.5, ExampleConfig().changed({"noise_levels.top_share": 1.0}))]
KEY, RATE = jax.random.key(1), np.float32(0.5)


@pytest.fixture(scope="module")
def network(tiny):
    return dataclasses.replace(tiny, depth=1)


@pytest.fixture(scope="module")
def batch():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    batch = {"frames": frames, "actions": np.zeros((2, 3), np.int32)}
    return sharding.to_devices(batch, sharding.make_mesh())


def fresh(network):
    """A state where updates leave it; elsewhere the first update would be compiled apart."""
    state = train_step.init_state(network, OPTIM, 0)
    return jax.device_put(state, sharding.placement(state, sharding.make_mesh()))


def losses_of(update, network, batch, shares):
    state, losses = fresh(network), []
    for share in shares:
        state, metrics = update(share, state, batch, KEY, rate=RATE)
        losses.append(float(metrics["train/loss"]))
    return losses


def test_a_stage_begins_at_its_share_also_in_a_run_that_starts_within_it(network, batch):
    setup = train_step.TrainSetup(network=network, optim=OPTIM, mesh=sharding.make_mesh())

    def plain(share, state, *args, **traced):
        of_stage = dataclasses.replace(setup, examples=NOISES[share >= 0.5][1])
        return train_step.train_step(state, *args, of_stage, **traced)

    for shares in ([0.0, 0.4, 0.5, 0.9], [0.6]):
        updates = stages.Stages(NOISES, setup)
        found = losses_of(updates.update, network, batch, shares)
        updates.close()
        assert found == losses_of(plain, network, batch, shares)


def test_the_next_stage_is_compiled_during_the_current_one(network, batch):
    setup = train_step.TrainSetup(network=network, optim=OPTIM, mesh=sharding.make_mesh())
    updates = stages.Stages(NOISES, setup)
    state, _ = updates.update(0.0, fresh(network), batch, KEY, rate=RATE)
    updates._next.result()
    before = train_step.train_step._cache_size()
    updates.update(0.5, state, batch, KEY, rate=RATE)
    assert train_step.train_step._cache_size() == before
    updates.close()
