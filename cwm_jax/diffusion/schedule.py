"""Noise: the schedule, noised samples, velocity targets, and their inverses.

v-parameterisation after Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512, §4); sigmoid
schedule after Jabri et al. 2022 (https://arxiv.org/abs/2212.11972, algorithm 1); a noise level of
its own for every frame after Chen et al. 2024 (https://arxiv.org/abs/2407.01392).

`alpha_bar` is the share of signal in a noised sample: x_t = √ᾱ x0 + √(1−ᾱ) ε.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.runtime import random_numbers

NUM_LEVELS = 1000  # noise levels are 0 (almost clean) … 999 (almost noise)
_START, _END, _TAU = -3.0, 3.0, 1.0


def betas() -> np.ndarray:
    """Noise added by each of the 1000 steps, float64 [1000], clipped to [0, 0.999]."""
    # The original takes the sigmoids of the two ends in float32.
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    first, last = (np.float64(np.float32(sigmoid(x / _TAU))) for x in (_START, _END))
    line = np.linspace(0, NUM_LEVELS, NUM_LEVELS + 1) / NUM_LEVELS
    curve = (last - sigmoid((line * (_END - _START) + _START) / _TAU)) / (last - first)
    curve = curve / curve[0]
    return np.clip(1 - curve[1:] / curve[:-1], 0, 0.999)


def alpha_bars() -> np.ndarray:
    """Share of signal at each noise level, float32 [1000], falling.

    The factors 1 − β are float32, as in the original; their product is computed in float64, as
    its `cumprod` does, and rounded once.
    """
    factors = 1 - betas().astype(np.float32)
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def step_level(number, steps):
    """The noise level at which the last `number` of so many steps begin.

    Entry `number` of linspace(−1, 999, steps + 1), truncated; −1, for number 0, is the clean
    sample. Takes whole numbers or arrays of them.
    """
    return NUM_LEVELS * number // steps - 1


class Noised(NamedTuple):
    """A training example: the noised frames and the velocity to predict, each [B, T, H, W, C]."""

    x: jax.Array
    velocity: jax.Array


def _per_frame(alpha_bar: jax.Array) -> jax.Array:
    return alpha_bar[..., None, None, None]


def noised(x0_BTHWC: jax.Array, t_BT: jax.Array, noise_BTHWC: jax.Array) -> Noised:
    """Noises clean frames in [-1, 1] to levels t (0…999) with noise ~ N(0, 1)."""
    alpha_bar = _per_frame(jnp.asarray(alpha_bars())[t_BT])
    signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    return Noised(
        x=signal * x0_BTHWC + sigma * noise_BTHWC,
        velocity=signal * noise_BTHWC - sigma * x0_BTHWC,
    )


def clean(x: jax.Array, velocity: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """x0 = √ᾱ x − √(1−ᾱ) v; `alpha_bar` broadcasts."""
    return jnp.sqrt(alpha_bar) * x - jnp.sqrt(1 - alpha_bar) * velocity


def velocity_of_clean(x: jax.Array, x0: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """v = (√ᾱ x − x0) / √(1−ᾱ), the inverse of `clean`; `alpha_bar` < 1 broadcasts."""
    return (jnp.sqrt(alpha_bar) * x - x0) / jnp.sqrt(1 - alpha_bar)


def ramp(alpha_bar: jax.Array) -> jax.Array:
    """Weights of squared velocity errors for an error of clean samples, float32.

    Dreamer 4 (Hafner et al. 2025, https://arxiv.org/abs/2509.24527) predicts clean samples
    and weighs their squared error by w(τ) = 0.9 τ + 0.1, where x_τ = τ x0 + (1 − τ) ε. The noised
    samples here, divided by √ᾱ + √(1−ᾱ), are x_τ with

        τ = √ᾱ / (√ᾱ + √(1−ᾱ)),

    so both have the same ratio of signal to noise. By `clean` an error of the velocity is one of
    the clean sample times −1 / √(1−ᾱ), so the weight of squared velocity errors is w(τ) (1 − ᾱ).
    Dreamer 4 samples τ; here the noise levels remain those of `sample`.
    """
    signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    return (0.9 * signal / (signal + sigma) + 0.1) * (1 - alpha_bar)


def epsilon(x: jax.Array, x0: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """The noise in x once x0 is known: ε = (x/√ᾱ − x0) / √(1/ᾱ − 1)."""
    return (jnp.sqrt(1 / alpha_bar) * x - x0) / jnp.sqrt(1 / alpha_bar - 1)


def predict_clean(x_BTHWC, velocity_BTHWC, t_BT) -> jax.Array:
    """Single-step estimate of the clean frames from a velocity predicted at levels t."""
    return clean(x_BTHWC, velocity_BTHWC, _per_frame(jnp.asarray(alpha_bars())[t_BT]))


def sample(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Noise levels int32 [B, T] ~ U{0…999} and noise float32 [B, T, H, W, C] ~ N(0, 1)."""
    level_key, noise_key = jax.random.split(key)
    t_BT = random_numbers.integers(level_key, shape[:2], 0, NUM_LEVELS)
    return t_BT, random_numbers.normal(noise_key, shape)


def loss(predicted: jax.Array, velocity: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Mean of weighted squared errors of the velocity, float32; `weights` broadcast."""
    return (weights * jnp.square(predicted.astype(jnp.float32) - velocity)).mean()
