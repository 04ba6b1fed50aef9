"""Pixels that move: where from, only within a patch, and learned by a network."""

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
    """The frames, changed by filters of these logits, [B, T, S, 2 · taps]."""
    moved = warp.change(jnp.asarray(frames), jnp.asarray(scores), reach=REACH, patch=PATCH)
    blocks = np.asarray(moved).reshape(2, 3, ROWS, COLUMNS, PATCH, PATCH, 3)
    return frames + blocks.swapaxes(3, 4).reshape(frames.shape)


def nothing_said():
    return np.zeros((2, 3, ROWS * COLUMNS, 2 * WIDTH), np.float32)


def test_where_nothing_is_said_most_of_a_pixel_stays(frames):
    spread = np.abs(changed(frames, nothing_said()) - frames).mean()
    elsewhere = nothing_said()
    elsewhere[..., [0, WIDTH]] = 50.0
    assert spread < 0.5 * np.abs(changed(frames, elsewhere) - frames).mean()
    flat = np.full_like(frames, 0.3)  # there is nothing that could move
    np.testing.assert_allclose(changed(flat, nothing_said()), flat, atol=1e-6)


@pytest.mark.parametrize(("down", "across"), [(0, 0), (0, 3), (-REACH, 0), (2, -REACH)])
def test_pixels_come_from_where_the_filters_look(frames, down, across):
    scores = nothing_said()
    scores[..., [REACH + down, WIDTH + REACH + across]] = 50.0
    rows = np.clip(np.arange(ROWS * PATCH) + down, 0, ROWS * PATCH - 1)
    columns = np.clip(np.arange(COLUMNS * PATCH) + across, 0, COLUMNS * PATCH - 1)
    wanted = frames[:, :, rows][:, :, :, columns]  # beyond the edge, the edge again
    np.testing.assert_allclose(changed(frames, scores), wanted, atol=1e-6)


def test_each_pixel_is_the_mean_that_its_patch_asks_for(frames):
    scores = np.random.default_rng(1).normal(size=nothing_said().shape).astype(np.float32)
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
    scores = np.random.default_rng(2).normal(size=nothing_said().shape).astype(np.float32)
    sharper = lambda scores, power: np.asarray(
        warp.change(frames, scores, reach=REACH, patch=PATCH, sharpness=power)
    )
    plain = warp.change(frames, scores, reach=REACH, patch=PATCH)
    np.testing.assert_array_equal(sharper(scores, 1.0), plain)
    # Weights to the power 3 are a softmax of 3 times the logits, the bias towards staying included.
    stay = np.zeros(2 * WIDTH, np.float32)
    stay[[REACH, WIDTH + REACH]] = warp._STAY
    np.testing.assert_allclose(
        sharper(scores, 3.0), sharper(3 * (scores + stay) - stay, 1.0), atol=1e-5
    )
    np.testing.assert_allclose(sharper(0.1 * scores, 100.0), 0, atol=1e-6)  # most stays; now all


def test_what_is_known_of_a_velocity():
    """Of Gaussian samples: what is left is unrelated to all that is given, and has its unit."""
    keys = jax.random.split(jax.random.key(5), 3)
    moved, around, noise = (jax.random.normal(key, (100_000,)) for key in keys)
    for alpha_bar, doubt in ((0.1, -1.5), (0.5, -4.0), (0.9, -2.0), (0.999, 0.7)):
        deviation, signal, sigma = np.exp(doubt / 2), alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        z = moved + deviation * around
        x = signal * z + sigma * noise
        known = warp.velocity(x, moved, doubt, jnp.zeros(()), alpha_bar)
        left = signal * noise - sigma * z - known
        for given in (x, moved, known):
            assert abs(np.corrcoef(left, given)[0, 1]) < 0.02
        unit = warp.velocity(x, moved, doubt, jnp.ones(()), alpha_bar) - known
        assert left.std() == pytest.approx(float(unit[0]), rel=0.02)


def test_without_doubt_said_the_guess_counts_by_the_noise():
    x, moved, rest = jax.random.normal(jax.random.key(6), (3, 50))
    found = warp.velocity(x, moved, 0.0, rest, 0.36)
    np.testing.assert_allclose(found, rest - 0.8 * moved, atol=1e-5)


def moving(config: DiTConfig, *, down: int, across: int) -> dict[str, jax.Array]:
    """A network that has learned nothing but to see all pixels from so far away."""
    params = dit.init(config, 0)
    bias, taps = np.zeros(2 * config.taps, np.float32), config.taps
    bias[[config.warp_reach + down, taps + config.warp_reach + across]] = 50.0
    return params | {"motion_out.bias": jnp.asarray(bias)}


@pytest.mark.parametrize("levels", [(999,), (999, 600, 200)])
def test_a_frame_is_drawn_of_moved_pixels(tiny, levels):
    config = dataclasses.replace(tiny, history=1, warp_reach=3)
    drawer = Sampler(config, moving(config, down=2, across=-3), SamplerConfig(levels=levels))
    prompt = np.random.default_rng(2).integers(0, 256, (1, 2, 64, 64, 3), np.uint8)
    _, drawn = drawer.rollout(drawer.start(prompt, [[-1, 3]]), [[3]], jax.random.key(0))
    wanted = prompt[:, -1, 2:, :-3]
    if len(levels) == 1:
        off = np.abs(np.asarray(drawn, int)[:, 0, :-2, 3:] - wanted)
        assert off.max() <= 3  # what one step leaves of the noise, on the scale of a change
    else:  # later steps leave what is there to the rest of the network, which knows nothing
        kept = np.corrcoef(np.asarray(drawn)[:, 0, :-2, 3:].ravel(), wanted.ravel())[0, 1]
        assert kept > 0.5


def test_what_moves_is_counted(tiny):
    still = dataclasses.replace(tiny, history=1)
    count = lambda config: flops.frame(config, in_view=1).patches
    more = count(dataclasses.replace(still, warp_reach=2)) - count(still)
    head, across = 2 * 5 * tiny.hidden_size, 5 * 3 * tiny.patch_size**2
    down = 5 * 3 * tiny.patch_size * (tiny.patch_size + 4)
    assert more == 2 * tiny.tokens * (head + down + across + tiny.hidden_size)


@pytest.mark.parametrize(
    ("sizes", "told"),
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
def test_motion_that_cannot_be(tiny, sizes, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(tiny, **sizes)
