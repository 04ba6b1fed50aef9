"""Fixtures shared by the tests."""

import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import compiled_programs

os.environ.update(compiled_programs.environment())

import jax
import numpy as np
import pytest
from tiny_network import TINY

from cwm_jax.coinrun import FRAME_SHAPE, NUM_ACTIONS
from cwm_jax.data.records import Episode, encode
from cwm_jax.data.shards import write_shard
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig

_MANY_MAPS = 15_000

# Tracing makes many objects, nearly all of which stay: with Python's own thresholds the search for
# cycles among them takes a noticeable part of the suite's time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """Compiled programs are dropped before the process has as many memory maps as Linux allows.

    A program compiled for a CPU takes several of the 65,530 maps that a process may have, and XLA
    crashes where there are none left.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def marked_episode() -> Callable[[int, int], Episode]:
    return _marked_episode


def _marked_episode(number: int, length: int) -> Episode:
    """An episode whose frames and actions encode where they are from.

    Pixel (0, 0) of frame t is (number, t, 0) and action t is (7·number + t) mod 15.
    """
    frames = np.zeros((length, *FRAME_SHAPE), np.uint8)
    frames[:, 0, 0, 0] = number
    frames[:, 0, 0, 1] = np.arange(length)
    actions = (7 * number + np.arange(length)) % NUM_ACTIONS
    return Episode(frames, actions.astype(np.int32))


@pytest.fixture
def make_data(tmp_path) -> Callable[..., Path]:
    """make_data(train=[[40, 33], [160]], …): a data folder of marked episodes.

    Each inner list is a shard and names the lengths of its episodes, which are numbered from 0
    through the split.
    """

    return functools.partial(_write_data, tmp_path)


@pytest.fixture(scope="session")
def write_data() -> Callable[..., Path]:
    """write_data(folder, train=[[40, 33], [160]], …): as `make_data`, in any folder."""
    return _write_data


def _write_data(folder: Path, **splits: Sequence[Sequence[int]]) -> Path:
    for split, shards in splits.items():
        (folder / split).mkdir()
        number = 0
        for i, lengths in enumerate(shards):
            episodes = [_marked_episode(number + k, n) for k, n in enumerate(lengths)]
            write_shard(folder / split / f"data_{i:04d}.array_record", map(encode, episodes))
            number += len(lengths)
    return folder


@pytest.fixture(scope="session")
def tiny() -> DiTConfig:
    """A network small enough to compile in a second, with a window of 5 frames."""
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny) -> dict[str, jax.Array]:
    """Parameters without zeros: initial ones have zero gates, which would hide errors."""
    return _at_work(tiny)


@pytest.fixture(scope="session")
def network_of(tiny, tiny_params) -> Callable[[int], tuple[DiTConfig, dict[str, jax.Array]]]:
    """network_of(history): `tiny`, shown so many earlier frames, whose pixels move as far.

    Its parameters are all at work, and without history its own.
    """
    with_history = functools.cache(lambda n: dataclasses.replace(tiny, history=n, warp_reach=n))
    params_of = functools.cache(lambda n: _at_work(with_history(n)))
    return lambda n: (with_history(n), params_of(n)) if n else (tiny, tiny_params)


def _at_work(network: DiTConfig) -> dict[str, jax.Array]:
    params = dit.init(network, 0)
    keys = jax.random.split(jax.random.key(1), len(params))
    # Filters are applied to every frame: large ones would amplify rounding errors.
    scale = lambda name: 0.02 if name.startswith("motion_out") else 0.1
    return {
        name: leaf + scale(name) * jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, params.items(), strict=True)
    }
