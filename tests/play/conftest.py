"""A tiny network whose gates are open, prompts from the embedded data, and a running device."""

import jax
import pytest

from cwm_jax import model
from cwm_jax.model import DiTConfig
from cwm_jax.play.engine import Engine
from cwm_jax.play.prompts import ClipPrompts
from cwm_jax.play.scheduler import Scheduler

NETWORK = DiTConfig(
    hidden_size=32,
    depth=1,
    num_heads=2,
    patch_size=8,
    image_size=64,
    num_actions=15,
    max_frames=8,
    dtype="float32",
)


def random_params(seed=0):
    """Parameters with noise on all of them: at init the gates are closed and nothing attends."""
    key = jax.random.key(seed)
    params = model.init(NETWORK, seed)
    return {
        name: value + 0.1 * jax.random.normal(jax.random.fold_in(key, i), value.shape)
        for i, (name, value) in enumerate(sorted(params.items()))
    }


@pytest.fixture(scope="session")
def params():
    return random_params()


@pytest.fixture(scope="session")
def engine(params):
    engine = Engine(NETWORK, params, steps=(2, 1))
    engine.compile(2, 1)
    engine.compile(1, 1)
    return engine


@pytest.fixture(scope="session")
def clips():
    return ClipPrompts("assets/coinrun")


@pytest.fixture(scope="session")
def scheduler(engine):
    with Scheduler(engine) as running:
        yield running
