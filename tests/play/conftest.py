"""A tiny network without zero gates, prompts from the embedded data, and running schedulers."""

import copy
import dataclasses
import functools

import numpy as np
import pytest

from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.governor import FrameRate
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.session.prompt_sources import ClipPrompts
from cwm_jax.rendering import video
from cwm_jax.tools import pack

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


PAD_KEYS = """
game = "pad game"
action_encoding = "buttons"
actions = [{name = "A", keys = ["KeyX"]}, {name = "LEFT", keys = ["ArrowLeft"]}, {name = "FIRE"}]
"""


def noisy(network):
    """Random values for every parameter: with initial gates, attention has no effect."""
    rng = np.random.default_rng(0)
    return {
        name: (0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in sorted(dit.shapes(network).items())
    }


@pytest.fixture(scope="session")
def built():
    """built(history): parameters and engine of a network with this history and a warp."""

    @functools.cache
    def build(history):
        network = dataclasses.replace(NETWORK, history=history, warp_reach=history)
        params = noisy(network)
        engine = Engine(network, params, steps=(2, 1))
        engine.compile(2, 1)
        engine.compile(1, 1)
        return params, engine

    return build


@pytest.fixture(scope="session")
def params(built):
    return built(0)[0]


@pytest.fixture(scope="session")
def engine(built):
    return built(0)[1]


@pytest.fixture(scope="session")
def clips():
    return ClipPrompts("assets/coinrun")


@pytest.fixture(scope="session")
def scheduler(engine):
    with Scheduler(engine) as running:
        yield running


@pytest.fixture
def slow_scheduler(engine, monkeypatch):
    """A device that generates 8 frames of 2 steps a second, with a model whose card lists only 2.

    It is as quick as any; only what is measured of it is fixed.
    """
    carded = copy.copy(engine)  # with the programs that are compiled
    carded.playable, carded.automatic = (2,), (2, 1)
    with Scheduler(carded) as running:
        running.governor.note = lambda **_: None
        running.governor._step_seconds = 1 / 8 / 4
        frame_seconds = lambda rate: running.governor._seconds(rate._steps)
        note = lambda rate, _: rate._seconds.append(frame_seconds(rate))
        monkeypatch.setattr(FrameRate, "note", note)
        yield running


@pytest.fixture(scope="session")
def pad_clips(tmp_path_factory):
    """Prompts of a game with three buttons, packed from one video."""
    folder = tmp_path_factory.mktemp("pad")
    videos = folder / "videos"
    videos.mkdir()
    (folder / "keys.toml").write_text(PAD_KEYS)
    shades = (np.full((64, 64, 3), 2 * t, np.uint8) for t in range(96))
    video.write_mp4(videos / "run.mp4", shades, fps=15)
    rows = [f"{t & 1},{t >> 1 & 1},{t >> 2 & 1}" for t in range(96)]
    (videos / "run.csv").write_text("\n".join(["A,LEFT,FIRE", *rows, ""]))
    options = ["--keys", folder / "keys.toml", "--output", folder / "data", "--chunk", 32]
    pack.main([str(word) for word in (videos, *options)])
    return ClipPrompts(folder / "data")


@pytest.fixture(scope="session")
def pad_scheduler():
    network = dataclasses.replace(NETWORK, num_actions=3, action_encoding="buttons", max_frames=4)
    with Scheduler(Engine(network, noisy(network), steps=(1,))) as running:
        yield running
