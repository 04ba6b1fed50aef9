"""The staggered cache equals one that is encoded from the same frames at once."""

import jax
import numpy as np
import pytest

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser
from cwm_jax.play.inference.engine import Lane
from cwm_jax.sampling import kv_cache, sampler, staggered_cache
from cwm_jax.sampling.sampler import SamplerConfig


@pytest.fixture(scope="module", params=[0, 2], ids=["frames", "changes"])
def both(request, built):
    return built(request.param)


@pytest.fixture(scope="module")
def params(both):
    return both[0]


@pytest.fixture(scope="module")
def engine(both):
    return both[1]


@pytest.fixture(scope="module")
def recording():
    """29 frames of noise, and the actions that led into them."""
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (29, 64, 64, 3), np.uint8), rng.integers(0, 15, 29)


def cache_of(engine, recording, stop, start=0):
    cache = engine.fresh()
    for frame, action in zip(recording[0][start:stop], recording[1][start:stop], strict=True):
        cache = engine.append(cache, frame, int(action))
    return cache


@pytest.fixture(scope="module")
def generate_from_window(engine, params):
    """The sampler's frame after a window that was encoded at once."""
    config = SamplerConfig(levels=sampler.ddim_levels(2))

    @jax.jit
    def generate(frames_u8_MHWC, actions_M, count, action, seed, number):
        net = denoiser.bind(engine.network, params)
        tables = sampler.tabulate(net, config)
        state = kv_cache.start(
            net, tables.context, to_model(frames_u8_MHWC)[None], actions_M[None], count
        )
        key = jax.random.fold_in(jax.random.key(seed), number)
        noise, step_key = sampler.frame_noise(key, (1, 64, 64, 3))
        frame = sampler.generate_frame(net, tables, state, action[None], noise, step_key, config)
        return sampler.to_pixels(frame[0])

    return generate


@pytest.mark.parametrize("length", [1, 6, 7, 8, 11, 12, 23, 29])
def test_the_next_frame_depends_on_its_window_alone(
    engine, recording, generate_from_window, length
):
    first = staggered_cache.first_cached(length, engine.slots)
    generated = engine.generate([Lane(cache_of(engine, recording, length), 7, 11, length)], 2, 1)[0]
    frames = np.zeros((engine.slots, 64, 64, 3), np.uint8)
    actions = np.full(engine.slots, -1)
    frames[: length - first] = recording[0][first:length]
    actions[: length - first] = recording[1][first:length]
    numbers = (np.int32(n) for n in (length - first, 7, 11, length))
    expected = np.asarray(generate_from_window(frames, actions, *numbers))
    assert np.abs(expected.astype(int) - generated).max() <= 1  # rounding may fall either way


def test_windows_slide_by_half_and_are_never_empty():
    slots = 7
    windows = [n - staggered_cache.first_cached(n, slots) for n in range(1, 100)]
    assert windows[:slots] == list(range(1, slots + 1))
    assert set(windows[slots:]) == set(range(slots - staggered_cache.stride(slots) + 1, slots + 1))


@pytest.mark.parametrize("length", [5, 8, 15, 29])
def test_a_cache_rebuilt_from_the_window_equals_the_full_cache_bit_for_bit(
    engine, recording, length
):
    first = staggered_cache.first_cached(length, engine.slots)
    later, full = cache_of(engine, recording, length, first), cache_of(engine, recording, length)
    for number in range(length, length + 9):  # past the next replacements of caches
        action = int(number) % 15
        ours = engine.generate([Lane(full, action, 5, number)], 2, 1)
        theirs = engine.generate([Lane(later, action, 5, number)], 2, 1)
        assert np.array_equal(ours, theirs)
        full = engine.append(full, ours[0], action)
        later = engine.append(later, theirs[0], action)


def test_a_lane_does_not_depend_on_its_neighbours(engine, recording):
    engine.compile(2, 4)
    lanes = [Lane(cache_of(engine, recording, n), n % 15, n, n) for n in (3, 9, 14, 20)]
    together = engine.generate(lanes, 2, 4)
    for index in (0, 3):
        alone = engine.generate([lanes[index]], 2, 4)[0]
        assert np.array_equal(alone, together[index])
    assert not np.array_equal(together[0], together[1])


def test_the_frame_depends_on_seed_number_and_action(engine, recording):
    cache = cache_of(engine, recording, 5)
    generate = lambda *rest: engine.generate([Lane(cache, *rest)], 2, 1)
    base = generate(7, 1, 5)
    assert np.array_equal(base, generate(7, 1, 5))
    for other in ((1, 1, 5), (7, 2, 5), (7, 1, 6)):
        assert not np.array_equal(base, generate(*other))
