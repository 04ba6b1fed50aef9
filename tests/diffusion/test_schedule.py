"""Noise: its inverse, and the ends of the schedule."""

import jax
import numpy as np
import pytest

from cwm_jax.diffusion import schedule


@pytest.fixture
def example():
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (2, 3, 8, 8, 3)
    x0 = jax.random.uniform(keys[0], shape, minval=-1, maxval=1)
    return x0, jax.random.normal(keys[1], shape)


def test_alpha_bar_falls_from_nearly_one_to_nearly_zero():
    alpha_bar = schedule.alpha_bars()
    assert alpha_bar.shape == (1000,)
    assert alpha_bar.dtype == np.float32
    assert (np.diff(alpha_bar) < 0).all()
    assert alpha_bar[0] > 0.999
    assert 0 < alpha_bar[-1] < 1e-6


@pytest.mark.parametrize("level", [0, 14, 500, 990])
def test_frame_and_noise_follow_from_the_velocity(example, level):
    x0, noise = example
    t = np.full((2, 3), level)
    sample = schedule.noised(x0, t, noise)
    alpha_bar = schedule.alpha_bars()[level]
    found = schedule.clean(sample.x, sample.velocity, alpha_bar)
    np.testing.assert_allclose(found, x0, atol=2e-6)
    np.testing.assert_allclose(schedule.predict_clean(*sample, t), x0, atol=2e-6)
    np.testing.assert_allclose(schedule.epsilon(sample.x, x0, alpha_bar), noise, atol=2e-4)


def test_each_frame_has_its_own_noise_level(example):
    x0, noise = example
    t = np.array([[0, 500, 999], [999, 0, 500]])
    x = np.asarray(schedule.noised(x0, t, noise).x)
    nearly_clean = np.abs(x - x0).max((2, 3, 4)) < 0.1
    nearly_noise = np.abs(x - noise).max((2, 3, 4)) < 0.1
    np.testing.assert_array_equal(nearly_clean, t == 0)
    np.testing.assert_array_equal(nearly_noise, t == 999)


def test_samples_cover_all_noise_levels_and_are_standard_normal():
    t, noise = schedule.sample(jax.random.key(3), (64, 64, 2, 2, 3))
    assert t.shape == (64, 64)
    assert t.min() == 0
    assert t.max() == 999
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_loss_is_the_mean_square():
    assert float(schedule.loss(np.full((2, 3), 1.0), np.full((2, 3), 3.0))) == 4.0
