"""Progressive distillation: a student generates in S steps what its teacher generates in 2 · S.

Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512, §3 and appendix G): from a noise level at
which a step of the student begins, two steps of the teacher, half as long, give its end point, and
so the target velocity. At all other levels the target is the teacher's own velocity, so that the
student can still generate in other numbers of steps. No target depends on randomness of the next
frame, so the gradients have little noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cwm_jax.diffusion import schedule
from cwm_jax.diffusion.schedule import NUM_LEVELS, step_level
from cwm_jax.runtime import random_numbers

_SHARE = 0.5  # of frames, at which the student's steps begin


def sample_levels(key: jax.Array, t: jax.Array, steps: int) -> jax.Array:
    """Noise levels like t, half of them replaced by levels where a step of the student begins."""
    share_key, step_key = jax.random.split(key)
    number = random_numbers.integers(step_key, t.shape, 1, steps + 1)
    on_step = random_numbers.happens(share_key, t.shape, _SHARE)
    return jnp.where(on_step, step_level(number, steps), t)


def velocity(predict: Callable, x_BTHWC: jax.Array, t_BT: jax.Array, steps: int) -> jax.Array:
    """The target velocities of a student of so many steps.

    Args:
        predict: (samples, noise levels) → the teacher's velocities [B, T, H, W, C].
        x_BTHWC: noised samples.
        t_BT: their noise levels.
    """
    end_BT = _ends(t_BT, steps)
    middle_BT = (t_BT + end_BT) // 2
    first = predict(x_BTHWC, t_BT)
    halfway = _after(x_BTHWC, first, t_BT, middle_BT)
    there = _after(halfway, predict(halfway, middle_BT), middle_BT, end_BT)
    cos, sin = _rotation(t_BT, end_BT)
    is_step = (end_BT < t_BT)[..., None, None, None]
    return jnp.where(is_step, (cos * x_BTHWC - there) / jnp.where(is_step, sin, 1), first)


def _ends(t: jax.Array, steps: int) -> jax.Array:
    """The level where the step that begins at t ends; t itself where no step begins."""
    number = -(-(t + 1) * steps // NUM_LEVELS)  # the least whose level is not below t
    return jnp.where(step_level(number, steps) == t, step_level(number - 1, steps), t)


def _after(x, velocity, t, next_t):
    """DDIM from level t to another, a rotation by their angle δ: cos δ · x − sin δ · v."""
    cos, sin = _rotation(t, next_t)
    return cos * x - sin * velocity


def _rotation(t, next_t):
    """Cosine and sine of the angle from a noise level to another; cos² is the share of signal."""
    alpha_bars = jnp.append(jnp.asarray(schedule.alpha_bars()), 1.0)  # entry −1, the last: clean
    now, after = (alpha_bars[level][..., None, None, None] for level in (t, next_t))
    signal, noise, next_signal, next_noise = map(jnp.sqrt, (now, 1 - now, after, 1 - after))
    return signal * next_signal + noise * next_noise, noise * next_signal - signal * next_noise
