"""A tiny network whose gates are open, prompts from the embedded data, and a running device."""

import numpy as np
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


@pytest.fixture(scope="session")
def params():
    """Noise for every parameter: as they are initialised, the gates are closed, nothing attends."""
    rng = np.random.default_rng(0)
    return {
        name: (0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in sorted(model.shapes(NETWORK).items())
    }


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
