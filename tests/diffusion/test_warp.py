"""Warps of the last frame: filters, velocities, and generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.diffusion import warp
from cwm_jax.errors import UserError
from cwm_jax.models import dit, flops
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling.sampler import Sampler, SamplerConfig

REACH, PATCH, ROWS, COLUMNS = 5, 7, 2, 3
WIDTH = 2 * REACH + 1


@pytest.fixture(scope="module")
def frames():
    shape = 2, 3, ROWS * PATCH, COLUMNS * PATCH, 3
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def changed(frames, scores):
    """The frames, warped by filters of these logits, [B, T, S, 2 · taps]."""
    warped = warp.residual(jnp.asarray(frames), jnp.asarray(scores), reach=REACH, patch=PATCH)
    blocks = np.asarray(warped).reshape(2, 3, ROWS, COLUMNS, PATCH, PATCH, 3)
    return frames + blocks.swapaxes(3, 4).reshape(frames.shape)


def zero_logits():
    return np.zeros((2, 3, ROWS * COLUMNS, 2 * WIDTH), np.float32)


def test_with_zero_logits_most_of_a_pixel_stays(frames):
    spread = np.abs(changed(frames, zero_logits()) - frames).mean()
    elsewhere = zero_logits()
    elsewhere[..., [0, WIDTH]] = 50.0
    assert spread < 0.5 * np.abs(changed(frames, elsewhere) - frames).mean()
    flat = np.full_like(frames, 0.3)  # any warp of it is the same
    np.testing.assert_allclose(changed(flat, zero_logits()), flat, atol=1e-6)


@pytest.mark.parametrize(("down", "across"), [(0, 0), (0, 3), (-REACH, 0), (2, -REACH)])
def test_filters_select_the_displaced_pixels(frames, down, across):
    scores = zero_logits()
    scores[..., [REACH + down, WIDTH + REACH + across]] = 50.0
    rows = np.clip(np.arange(ROWS * PATCH) + down, 0, ROWS * PATCH - 1)
    columns = np.clip(np.arange(COLUMNS * PATCH) + across, 0, COLUMNS * PATCH - 1)
    wanted = frames[:, :, rows][:, :, :, columns]  # beyond the edge, the edge again
    np.testing.assert_allclose(changed(frames, scores), wanted, atol=1e-6)


def test_each_pixel_is_the_weighted_mean_of_its_filters(frames):
    scores = np.random.default_rng(1).normal(size=zero_logits().shape).astype(np.float32)
    found = changed(frames, scores)
    around = [(0, 0), (0, 0), (REACH, REACH), (REACH, REACH), (0, 0)]
    padded = np.pad(frames, around, mode="edge")
    for y, x in np.ndindex(ROWS * PATCH, COLUMNS * PATCH):
        own = np.exp(scores[:, :, y // PATCH * COLUMNS + x // PATCH])
        own[..., [REACH, WIDTH + REACH]] *= np.exp(4)
        down, across = own[..., :WIDTH], own[..., WIDTH:]
        seen = padded[:, :, y : y + WIDTH, x : x + WIDTH]
        wanted = np.einsum("btr,bts,btrsc->btc", down, across, seen)
        wanted /= (down.sum(-1) * across.sum(-1))[..., None]
        np.testing.assert_allclose(found[:, :, y, x], wanted, rtol=1e-4, atol=1e-4)


def test_filters_to_a_power_point_at_the_place_that_they_prefer(frames):
    scores = np.random.default_rng(2).normal(size=zero_logits().shape).astype(np.float32)
    sharper = lambda scores, power: np.asarray(
        warp.residual(frames, scores, reach=REACH, patch=PATCH, sharpness=power)
    )
    plain = warp.residual(frames, scores, reach=REACH, patch=PATCH)
    np.testing.assert_array_equal(sharper(scores, 1.0), plain)
    # Weights to the power 3 are a softmax of 3 times the logits, the bias towards staying included.
    stay = np.zeros(2 * WIDTH, np.float32)
    stay[[REACH, WIDTH + REACH]] = warp.STAY
    np.testing.assert_allclose(
        sharper(scores, 3.0), sharper(3 * (scores + stay) - stay, 1.0), atol=1e-5
    )
    np.testing.assert_allclose(sharper(0.1 * scores, 100.0), 0, atol=1e-6)  # most stays; now all


def test_mean_and_deviation_of_a_velocity():
    """For Gaussian samples the remainder is uncorrelated with the inputs and has the given unit."""
    keys = jax.random.split(jax.random.key(5), 3)
    warped, around, noise = (jax.random.normal(key, (100_000,)) for key in keys)
    for alpha_bar, log_variance in ((0.1, -1.5), (0.5, -4.0), (0.9, -2.0), (0.999, 0.7)):
        deviation, signal, sigma = np.exp(log_variance / 2), alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        z = warped + deviation * around
        x = signal * z + sigma * noise
        known = warp.velocity(x, warped, log_variance, jnp.zeros(()), alpha_bar)
        left = signal * noise - sigma * z - known
        for given in (x, warped, known):
            assert abs(np.corrcoef(left, given)[0, 1]) < 0.02
        unit = warp.velocity(x, warped, log_variance, jnp.ones(()), alpha_bar) - known
        assert left.std() == pytest.approx(float(unit[0]), rel=0.02)


def test_with_log_variance_0_the_velocity_is_that_of_the_warp():
    x, warped, rest = jax.random.normal(jax.random.key(6), (3, 50))
    found = warp.velocity(x, warped, 0.0, rest, 0.36)
    np.testing.assert_allclose(found, rest - 0.8 * warped, atol=1e-5)


def moving(config: DiTConfig, *, down: int, across: int) -> dict[str, jax.Array]:
    """A network that does nothing but displace all pixels by this distance."""
    params = dit.init(config, 0)
    bias, taps = np.zeros(2 * config.taps, np.float32), config.taps
    bias[[config.warp_reach + down, taps + config.warp_reach + across]] = 50.0
    return params | {"motion_out.bias": jnp.asarray(bias)}


@pytest.mark.parametrize("levels", [(999,), (999, 600, 200)])
def test_a_frame_is_generated_from_displaced_pixels(tiny, levels):
    config = dataclasses.replace(tiny, history=1, warp_reach=3)
    generator = Sampler(config, moving(config, down=2, across=-3), SamplerConfig(levels=levels))
    prompt = np.random.default_rng(2).integers(0, 256, (1, 2, 64, 64, 3), np.uint8)
    _, generated = generator.rollout(generator.start(prompt, [[-1, 3]]), [[3]], jax.random.key(0))
    wanted = prompt[:, -1, 2:, :-3]
    if len(levels) == 1:
        off = np.abs(np.asarray(generated, int)[:, 0, :-2, 3:] - wanted)
        assert off.max() <= 3  # the remaining noise of one step, times `residual_scale`
    else:  # later steps leave the rest to the untrained part of the network
        kept = np.corrcoef(np.asarray(generated)[:, 0, :-2, 3:].ravel(), wanted.ravel())[0, 1]
        assert kept > 0.5


def test_operations_of_the_warp(tiny):
    still = dataclasses.replace(tiny, history=1)
    count = lambda config: flops.frame(config, in_view=1).patches
    more = count(dataclasses.replace(still, warp_reach=2)) - count(still)
    head, across = 2 * 5 * tiny.hidden_size, 5 * 3 * tiny.patch_size**2
    down = 5 * 3 * tiny.patch_size * (tiny.patch_size + 4)
    assert more == 2 * tiny.tokens * (head + down + across + tiny.hidden_size)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(warp_reach=3), r"config\.model\.warp_reach=3 needs config\.model\.history"),
        (
            dict(warp_reach=17, history=1),
            r"warp_reach=17 must be at most config\.model\.patch_size=16",
        ),
        (
            dict(warp_reach=-1, history=1),
            r"config\.model\.warp_reach=-1: must be 0 or more",
        ),
    ],
)
def test_invalid_warp_sizes_are_refused(tiny, sizes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny, **sizes)
