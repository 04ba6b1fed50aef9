"""LPIPS to what is nearest in real frames, as a whole and place by place."""

import numpy as np
import pytest
from lpips_case import pictures, weights

from cwm_jax.errors import UserError
from cwm_jax.evaluation import drift, lpips, nearest_real


@pytest.fixture(scope="module")
def net() -> lpips.Lpips:
    return lpips.from_arrays(weights(), "random")


def level(seed: int, frames: int) -> np.ndarray:
    """Views of one picture of large blocks, each from another place: uint8 [frames, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    world = np.kron(rng.integers(256, size=(12, 24, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    return np.stack([world[64:128, 4 * t : 4 * t + 64] for t in range(frames)])


def test_to_the_nearest_frame_it_is_the_least_lpips(net):
    a, b = pictures()
    found = nearest_real.distances(net, a[:4], b)
    every = np.stack([lpips.distances(net, a[:4], b[[i] * 4]) for i in range(len(b))])
    np.testing.assert_allclose(found.frame, every.min(0), atol=1e-5)
    assert (found.places <= found.frame + 1e-5).all()


def test_what_is_shown_elsewhere_in_the_level_is_near_by_places_and_other_things_are_not(net):
    views, other = level(0, 24), level(1, 3)
    real, moved = views[::2], views[3:15:4]  # between two real ones, as far from each as they can
    near, strange = (nearest_real.distances(net, x, real) for x in (moved, other))
    np.testing.assert_allclose(nearest_real.distances(net, real[:3], real).places, 0, atol=1e-5)
    assert near.frame.mean() > 0.3 * strange.frame.mean()
    assert near.places.mean() < 0.4 * strange.places.mean()


def test_drift_says_when_a_rollout_leaves_its_level(net):
    there = np.stack([level(seed, 16) for seed in (2, 3)])
    real = np.concatenate([there, there[:, ::-1]], axis=1)  # and back
    generated = real[:, ::-1].copy()
    kept = drift.summary(generated, real, lpips=net)["nearest_real"]
    assert kept["frames_to_leave"]["mean"] > 16
    generated[:, 16:] = level(9, 16)
    left = drift.summary(generated, real, lpips=net)["nearest_real"]
    assert left["mean"]["mean"] > 1.5 * left["real"]["mean"]
    assert 0 < left["frames_to_leave"]["mean"] <= 16
    assert "nearest_real" not in drift.summary(generated, real)


def test_pictures_that_are_not_finite_or_too_small_are_refused(net):
    a, b = pictures()
    with pytest.raises(UserError, match="too small"):
        nearest_real.distances(net, a[:, :20], b[:, :20])
    b[2, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        nearest_real.distances(net, a, b)
