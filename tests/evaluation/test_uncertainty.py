"""Whether a model knows where it is wrong: the signs, and how they rank its errors."""

import jax
import numpy as np
import pytest

from cwm_jax.errors import UserError
from cwm_jax.evaluation import full, uncertainty
from cwm_jax.evaluation.uncertainty import Maps
from cwm_jax.rendering import patch_overlay

RNG = np.random.default_rng(0)
REAL = RNG.integers(60, 200, size=(5, 7, 64, 64, 3)).astype(np.uint8)
ACTIONS = np.zeros((5, 7), np.int32)
# How far generated frames may be from the real ones: each patch of each frame has its own measure.
SIZE = RNG.integers(1, 50, size=(5, 6, 8, 8))


def unsure(prompt, actions, key):
    """Frames that are wrong by their own measure, which is what they differ by between seeds."""
    noise = np.asarray(jax.random.normal(key, (5, 6, 64, 64, 3)))
    wrong = noise * SIZE.repeat(8, axis=2).repeat(8, axis=3)[..., None]
    return np.clip(REAL[:, 1:] + wrong, 0, 255).astype(np.uint8)


def measured(generate, **others) -> Maps:
    settings = dict(n_prompt=1, patch=8, seeds=3, seed=2**32 - 1, batch_size=5) | others
    return uncertainty.measure(generate, None, REAL, ACTIONS, **settings)


def test_a_model_that_differs_where_it_is_wrong_is_found_to_know_it():
    maps = measured(unsure)
    assert maps.spread.shape == maps.error.shape == (5, 6, 8, 8)
    assert maps.instability is None
    found = uncertainty.summary(maps, seeds=3)
    assert found["spread"]["where"]["low"] > 0.9
    assert found["spread"]["beyond"]["low"] > 0.8
    assert abs(found["change"]["where"]["mean"]) < found["spread"]["where"]["mean"]
    assert "instability" not in found
    assert uncertainty.best_sign(found) == "spread"
    assert np.shape(found["error"]["by_patch"]) == (8, 8)
    assert len(found["error"]["by_frame"]["mean"]) == 6


def test_one_that_is_wrong_elsewhere_is_not():
    maps = measured(unsure)
    shuffled = RNG.permuted(maps.error.reshape(5, 6, -1), axis=-1).reshape(maps.error.shape)
    found = uncertainty.summary(maps._replace(error=shuffled), seeds=3)["spread"]["where"]
    assert found["low"] < 0 < found["high"]


def test_the_spread_is_the_deviation_of_the_other_seeds():
    maps = measured(unsure)
    keys = [jax.random.fold_in(jax.random.key((2**32 - 1 + k) % 2**32), 0) for k in (1, 2, 3)]
    frames = np.stack([unsure(None, None, key) for key in keys]).astype(np.float64)
    variance = frames.var(axis=0, ddof=1).reshape(5, 6, 8, 8, 8, 8, 3).mean((3, 5, 6))
    np.testing.assert_allclose(maps.spread, np.sqrt(variance), rtol=1e-4)


def test_a_model_without_noise_has_no_spread_and_no_rank():
    maps = measured(lambda prompt, actions, key: REAL[:, :6])
    assert not maps.spread.any()
    found = uncertainty.summary(maps, seeds=3)
    assert np.isnan(found["spread"]["where"]["mean"])
    assert np.isnan(found["spread"]["which"]["mean"])


def test_correlations_are_those_of_ranks():
    sign = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [4, 4, 4, 4]])
    error = np.array([[1.0, 10, 100, 1000], [9, 7, 5, 3], [1, 2, 3, 4]])
    np.testing.assert_allclose(uncertainty.spearman(sign, error), [1, -1, np.nan])


def test_a_spread_of_one_seed_is_refused():
    with pytest.raises(UserError, match="seeds=1"):
        full.Plan(seeds=1)
    assert full.Plan(seeds=0).seeds == 0


def test_the_tint_is_none_at_0_and_strongest_from_the_top_of_the_scale_on():
    frames = np.full((1, 4, 4, 3), 100, np.uint8)
    values = np.array([[[0, 5], [10, 20.0]]])
    found = patch_overlay.tinted(frames, values, most=10)
    assert (found[0, :2, :2] == 100).all()
    assert found[0, 0, 2, 0] > 100 > found[0, 0, 2, 1]
    np.testing.assert_array_equal(found[0, 2:, :2], found[0, 2:, 2:])
    assert patch_overlay.rows([frames, found], scale=2, gap=1).shape == (18, 9, 3)
