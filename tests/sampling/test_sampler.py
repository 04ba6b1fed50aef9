"""The sampler: compared with a plain one and with an oracle, and its documented properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser, residual, schedule
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.sampling import kv_cache, sampler
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels

KEY = jax.random.key(7)
LEVELS = ddim_levels(3)


def prompt_of(tiny, worlds=2, frames=1, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (worlds, frames, 64, 64, 3), np.uint8)
    actions = rng.integers(0, tiny.num_actions, (worlds, frames))
    actions[:, 0] = -1
    return pixels, actions


@functools.partial(jax.jit, static_argnums=0)
def network(config, params, *inputs):
    return denoiser.bind(config, params)(*inputs)


def plainly(tiny, params, config, prompt, actions, key):
    """The reference: every step over the whole window, without cache; float [B, F, H, W, C]."""
    window = tiny.max_frames
    alpha_bars = schedule.alpha_bars()
    frames = list(np.moveaxis(prompt.astype(np.float32) / 255 * 2 - 1, 1, 0))
    shape = frames[0].shape
    for i in range(prompt.shape[1], actions.shape[1]):
        number = min(prompt.shape[1], window - 1) + i - prompt.shape[1]
        x, _ = sampler.frame_noise(jax.random.fold_in(key, number), shape)
        context = jnp.stack(frames[-(window - 1) :], axis=1)
        # A frame does not depend on its own pixels, so any may be used for the new one.
        beside = residual.earlier(tiny, jnp.concatenate([context, context[:, -1:]], axis=1))
        at = lambda frame, beside=beside: None if beside is None else beside[:, frame]
        known = residual.to_sample(tiny, context, at(slice(0, -1)))
        for level, after in zip(config.levels, (*config.levels[1:], None), strict=True):
            seen = jnp.concatenate([known, x[:, None]], axis=1)
            t = jnp.full(seen.shape[:2], config.context_level).at[:, -1].set(level)
            first = max(0, i + 1 - window)
            inputs = seen, t, actions[:, first : i + 1], beside
            velocity = network(tiny, params, *inputs)[:, -1]
            x0 = schedule.clean(x, velocity, alpha_bars[level])
            noise = schedule.epsilon(x, x0, alpha_bars[level])
            left = 1.0 if after is None else alpha_bars[after]
            x = np.sqrt(left) * x0 + np.sqrt(1 - left) * noise
        frames.append(np.asarray(residual.to_frame(tiny, x, at(-1))))
    return np.stack(frames[prompt.shape[1] :], axis=1)


def unclamped(tiny, params, config, state, actions, key):
    """`Sampler.rollout`, but with the world's own frames: float, unclamped."""
    frames = _unclamped(tiny, params, config, state, np.asarray(actions).T, key)
    return np.moveaxis(np.asarray(frames), 0, 1)


@functools.partial(jax.jit, static_argnames=("tiny", "config"))
def _unclamped(tiny, params, config, state, actions_FB, key):
    net = denoiser.bind(tiny, params)
    tables = sampler.tabulate(net, config)

    def one(state, action_B):
        frame_key = jax.random.fold_in(key, state.count)
        noise, step_key = sampler.frame_noise(frame_key, state.frames_BMHWC[:, 0].shape)
        return sampler.step(net, tables, state, action_B, noise, step_key, config)

    return jax.lax.scan(one, state, actions_FB)[1]


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("given", [1, 3, 5])
def test_exact_equals_the_plain_sampler_at_every_length(network_of, given, history):
    tiny, tiny_params = network_of(history)
    config = SamplerConfig(levels=LEVELS, window="exact")
    prompt, led_in = prompt_of(tiny, frames=given)
    actions = np.concatenate([led_in, np.full((2, 6), 7)], axis=1)
    actions[1, given + 2] = 1
    expected = plainly(tiny, tiny_params, config, prompt, actions, KEY)
    state = Sampler(tiny, tiny_params, config).start(prompt, led_in)
    generated = unclamped(tiny, tiny_params, config, state, actions[:, given:], KEY)
    np.testing.assert_allclose(generated, expected, atol=2e-4)


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("window", ["cached", "hop"])
def test_other_windows_are_exact_until_the_window_slides(network_of, window, history):
    tiny, tiny_params = network_of(history)
    prompt, led_in = prompt_of(tiny)
    actions = np.array([[7] * 6, [1] * 6])
    generated = {}
    for mode in ("exact", window):
        config = SamplerConfig(levels=LEVELS, window=mode)
        state = Sampler(tiny, tiny_params, config).start(prompt, led_in)
        generated[mode] = unclamped(tiny, tiny_params, config, state, actions, KEY)
    within = tiny.max_frames - 1
    np.testing.assert_allclose(
        generated[window][:, :within], generated["exact"][:, :within], atol=2e-4
    )
    assert np.abs(generated[window] - generated["exact"])[:, within:].max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("window", ["exact", "cached", "hop"])
def test_a_frame_may_be_encoded_with_the_next_one(network_of, window, history, steps):
    """Steps equal those of worlds whose frames are all encoded at once, at every length."""
    tiny, tiny_params = network_of(history)
    config = SamplerConfig(levels=ddim_levels(steps), window=window)
    prompt, led_in = prompt_of(tiny)
    actions = np.random.default_rng(2).integers(0, tiny.num_actions, (2, 12))

    @jax.jit
    def at_once(state, actions_FB):
        net = denoiser.bind(tiny, tiny_params)
        tables = sampler.tabulate(net, config)

        def one(state, action_B):
            noise, key = sampler.frame_noise(
                jax.random.fold_in(KEY, state.count), prompt[:, 0].shape
            )
            frame = sampler.generate_frame(net, tables, state, action_B, noise, key, config)
            context = tables.context, state, frame, action_B, window
            return kv_cache.advance(net, *context), frame

        return jax.lax.scan(one, state, actions_FB)[1]

    start = lambda: Sampler(tiny, tiny_params, config).start(prompt, led_in)
    together = unclamped(tiny, tiny_params, config, start(), actions, KEY)
    one_by_one = np.moveaxis(np.asarray(at_once(start(), actions.T)), 0, 1)
    np.testing.assert_allclose(together, one_by_one, atol=2e-4)


def test_worlds_of_a_single_frame_equal_started_ones(network_of):
    tiny, tiny_params = network_of(2)
    config = SamplerConfig(levels=LEVELS, window="cached")
    prompt, led_in = prompt_of(tiny)
    actions = np.full((2, 6), 7)
    begin = lambda: kv_cache.first_frame(
        denoiser.bind(tiny, tiny_params), to_model(prompt[:, 0]), led_in[:, 0]
    )
    started = Sampler(tiny, tiny_params, config).start(prompt, led_in)
    rollout = functools.partial(unclamped, tiny, tiny_params, config)
    np.testing.assert_allclose(
        rollout(jax.jit(begin)(), actions, KEY), rollout(started, actions, KEY), atol=2e-5
    )


@pytest.mark.parametrize("history", [0, 2])
def test_after_a_hop_the_world_equals_a_fresh_one(network_of, history):
    """After a hop the world equals one that starts from the kept frames."""
    tiny, tiny_params = network_of(history)
    config = SamplerConfig(levels=LEVELS, window="hop")
    generator = Sampler(tiny, tiny_params, config)
    prompt, led_in = prompt_of(tiny, frames=4)  # as many as there are slots: the next one hops
    state, _ = generator.step(generator.start(prompt, led_in), [7, 1], KEY)
    kept = int(state.count - state.first)
    assert kept == (tiny.max_frames) // 2
    slots = (int(state.first) + np.arange(kept)) % state.slots
    pad = ((0, 0), (0, state.slots - kept), (0, 0), (0, 0), (0, 0))
    net = denoiser.bind(tiny, tiny_params)
    context = jax.jit(lambda: sampler.tabulate(net, config).context)()
    fresh = jax.jit(functools.partial(kv_cache.start, net, context))(
        np.pad(np.asarray(state.frames_BMHWC)[:, slots], pad),
        np.pad(np.asarray(state.actions_BM)[:, slots], pad[:2], constant_values=-1),
        kept,
    )
    for hopped, encoded in zip(jax.tree.leaves(state.kv), jax.tree.leaves(fresh.kv), strict=True):
        np.testing.assert_allclose(hopped[:, :, :, slots], encoded[:, :, :, :kept], atol=1e-5)


def test_an_oracle_is_recovered(tiny):
    """With the true velocity, DDIM must reach the true frame, in any number of steps."""
    truth = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)

    class Network:
        def frame_outputs(self, x, modulations, past, earlier):
            signal = modulations.final[..., None, None]
            noise = (x - jnp.sqrt(signal) * truth[:, None]) / jnp.sqrt(1 - signal)
            return jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * truth[:, None]

    class Oracle(denoiser.Denoiser):
        config = tiny

        def velocity(self, outputs, *seen):
            return outputs

    for steps in (1, 2, 7, 50):
        config = SamplerConfig(levels=ddim_levels(steps))
        alpha_bar = schedule.alpha_bars()[list(config.levels)]
        table = np.repeat(alpha_bar[:, None, None], tiny.num_actions + 1, 1)
        tables = sampler.Tables(dit.Modulations(np.zeros_like(table), table), None)
        tables = jax.tree.map(jnp.asarray, tables)
        state = blank_world(tiny)
        start = jax.random.normal(KEY, truth.shape)
        generated = sampler.generate_frame(
            Oracle(Network()), tables, state, jnp.array([7]), start, None, config
        )
        np.testing.assert_allclose(generated, truth, atol=3e-3)


def blank_world(tiny):
    empty = jnp.zeros((1, tiny.tokens, tiny.num_heads, 4, tiny.head_size))
    kv = dit.FrameKV((empty,) * tiny.depth, (empty,) * tiny.depth)
    frames = jnp.zeros((1, 4, 64, 64, 3))
    return kv_cache.World(frames, jnp.zeros((1, 4), int), kv, jnp.int32(0), jnp.int32(1))


def test_levels_are_the_references():
    assert ddim_levels(10) == (999, 899, 799, 699, 599, 499, 399, 299, 199, 99)
    assert ddim_levels(4) == (999, 749, 499, 249)
    assert ddim_levels(3) == (999, 665, 332)
    assert ddim_levels(1) == (999,)
    assert ddim_levels(1000) == tuple(range(999, -1, -1))


def test_a_rollout_in_two_calls_is_the_same_rollout(tiny, tiny_params):
    generator = Sampler(tiny, tiny_params, SamplerConfig(levels=LEVELS))
    prompt, led_in = prompt_of(tiny)
    actions = np.random.default_rng(1).integers(0, 15, (2, 6))
    _, whole = generator.rollout(generator.start(prompt, led_in), actions, KEY)
    state = generator.start(prompt, led_in)
    parts = []
    for begin, end in ((0, 3), (3, 6)):
        state, part = generator.rollout(state, actions[:, begin:end], KEY)
        parts.append(part)
    # A program of another length: as tests compile it, sums may round otherwise.
    off = np.abs(np.concatenate(parts, axis=1).astype(int) - whole)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-4
    assert whole.dtype == np.uint8
    assert int(state.count) == 7


def test_worlds_of_a_batch_are_independent(tiny, tiny_params):
    generator = Sampler(tiny, tiny_params, SamplerConfig(levels=LEVELS))
    prompt, led_in = prompt_of(tiny)
    _, same = generator.rollout(generator.start(prompt, led_in), [[7] * 6, [7] * 6], KEY)
    _, other = generator.rollout(generator.start(prompt, led_in), [[7] * 6, [1] * 6], KEY)
    np.testing.assert_array_equal(same[0], other[0])
    assert (np.asarray(same[1]) != np.asarray(other[1])).any()


@pytest.mark.parametrize("window", ["exact", "cached", "hop"])
def test_one_program_serves_every_length(tiny, tiny_params, window):
    config = SamplerConfig(levels=ddim_levels(2), window=window)
    generator = Sampler(tiny, tiny_params, config)
    traces = sampler._step._cache_size(), sampler._start._cache_size()
    for given in (1, 2, 5):
        state = generator.start(*prompt_of(tiny, worlds=3, frames=given))
        for _ in range(9):
            state, _ = generator.step(state, [7, 1, 4], KEY)
    assert (sampler._step._cache_size(), sampler._start._cache_size()) == (
        traces[0] + 1,
        traces[1] + 1,
    )


def test_device_memory_does_not_grow(tiny, tiny_params):
    generator = Sampler(tiny, tiny_params, SamplerConfig(levels=ddim_levels(1), window="cached"))
    state = generator.start(*prompt_of(tiny))
    shapes = jax.tree.map(jnp.shape, state)
    state, _ = generator.rollout(state, np.full((2, 40), 7), KEY)
    assert jax.tree.map(jnp.shape, state) == shapes


def test_stochastic_steps(tiny, tiny_params):
    prompt, led_in = prompt_of(tiny)

    def generated(eta, key):
        config = SamplerConfig(levels=LEVELS, eta=eta)
        generator = Sampler(tiny, tiny_params, config)
        return np.asarray(generator.step(generator.start(prompt, led_in), [7, 7], key)[1])

    assert (generated(1.0, KEY) == generated(1.0, KEY)).all()
    assert (generated(1.0, KEY) != generated(0.0, KEY)).any()
    assert (generated(1.0, KEY) != generated(1.0, jax.random.key(8))).any()


def test_stochastic_variance_follows_the_paper(tiny):
    """σ² + (what is left for ε) = 1 − ᾱ′, and η = 1 is DDPM's posterior variance."""
    config = SamplerConfig(levels=(700, 300), eta=1.0)
    tables = sampler.Tables(dit.Modulations(jnp.zeros(2), jnp.zeros(2)), None)
    steps = sampler._steps(tables, config)
    now, after = schedule.alpha_bars()[[700, 300]]
    posterior = (1 - after) / (1 - now) * (1 - now / after)
    assert float(steps.sigma[0]) ** 2 == pytest.approx(posterior, rel=1e-5)
    assert float(steps.sigma[1]) == 0.0


def test_bfloat16_stays_near(tiny, tiny_params):
    """One step from the same noise: the difference is rounding, not another picture."""
    prompt, led_in = prompt_of(tiny, frames=3)
    frames = {}
    for dtype in ("float32", "bfloat16"):
        network = dataclasses.replace(tiny, dtype=dtype)
        generator = Sampler(network, tiny_params, SamplerConfig(levels=LEVELS))
        state, generated = generator.step(generator.start(prompt, led_in), [7, 7], KEY)
        assert state.kv.keys[0].dtype == dtype
        frames[dtype] = np.asarray(generated, np.float32) / 255
    psnr = -10 * np.log10(np.square(frames["float32"] - frames["bfloat16"]).mean())
    assert psnr > 30


def test_mistakes_are_named(tiny, tiny_params):
    generator = Sampler(tiny, tiny_params, SamplerConfig(levels=LEVELS))
    frames, actions = prompt_of(tiny, frames=5)
    state = generator.start(frames[:, :1], actions[:, :1])
    late = actions.copy()
    late[0, 2] = -1
    six = prompt_of(tiny, frames=6)
    for message, call in (
        ("6 prompt frames", lambda: generator.start(*six)),
        ("0 prompt frames", lambda: generator.start(frames[:, :0], actions[:, :0])),
        ("actions of shape", lambda: generator.start(frames, actions[:, :4])),
        ("action -1", lambda: generator.start(frames, late)),
        ("action 15", lambda: generator.rollout(state, [[15], [0]], KEY)),
        ("action -1", lambda: generator.rollout(state, [[-1], [0]], KEY)),
        ("whole numbers", lambda: generator.rollout(state, [[0.5], [0.0]], KEY)),
        ("for 2 worlds", lambda: generator.rollout(state, [[0]], KEY)),
        ("32, 32", lambda: generator.start(frames[:, :, :32, :32], actions)),
        ("float", lambda: generator.start(frames / 255, actions)),
        ("ddim_steps", lambda: ddim_levels(0)),
        ("ddim_steps", lambda: ddim_levels(1001)),
        ("must fall", lambda: SamplerConfig(levels=(5, 5))),
        ("must be 0…999, not 1000", lambda: SamplerConfig(levels=(1000, 5))),
        ("sliding", lambda: SamplerConfig(window="sliding")),
        ("eta", lambda: SamplerConfig(eta=2.0)),
        ("max_frames=1", lambda: one_frame_sampler(tiny, tiny_params)),
    ):
        with pytest.raises(UserError, match=message):
            call()


def one_frame_sampler(tiny, params):
    return Sampler(dataclasses.replace(tiny, max_frames=1), params, SamplerConfig())


def test_a_watched_rollout_draws_the_same_frames_and_says_how_far_the_prediction_moved(network_of):
    network, params = network_of(2)  # whose frames are clamped, as the prediction of each step is
    prompt = np.random.default_rng(0).integers(256, size=(2, 2, 64, 64, 3)).astype(np.uint8)
    drawer_of = lambda *levels: Sampler(network, params, SamplerConfig(levels=levels))
    start = lambda drawer: drawer.start(prompt, [[-1, 3], [-1, 4]])
    once, twice = drawer_of(999), drawer_of(999, 499)
    actions = [[7], [7]]
    _, first = once.rollout(start(once), actions, KEY)
    _, plain = twice.rollout(start(twice), actions, KEY)
    _, watched, moved = twice.watched_rollout(start(twice), actions, KEY)
    first, plain, watched = (np.asarray(x, np.float32) for x in (first, plain, watched))
    assert np.abs(watched - plain).max() <= 1
    # The first of two steps predicts what a single one returns.
    squared = np.square(plain - first).reshape(2, 1, 4, 16, 4, 16, 3).mean((3, 5, 6))
    np.testing.assert_allclose(moved, np.sqrt(squared), atol=1)
    assert np.asarray(moved).min() > 2
