"""Learning to draw in S steps what a teacher draws in 2 · S.

Progressive distillation (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, §3 and appendix G):
from a label where a step of the student begins, two steps of the teacher, half as long, say where
it has to end, and so the velocity with which it gets there. At all other labels the teacher's own
velocity is learned, lest the student forget how to draw in other numbers of steps. No target
depends on what is unknown of the next frame, so there is little noise in the gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cwm_jax.diffusion import schedule
from cwm_jax.diffusion.schedule import NUM_LEVELS, step_label
from cwm_jax.runtime import random_numbers

_SHARE = 0.5  # of frames, at which the student's steps begin


def draw(key: jax.Array, t: jax.Array, steps: int) -> jax.Array:
    """Labels of the same shape, half of them those where a sampler of so many steps begins one."""
    share_key, step_key = jax.random.split(key)
    number = random_numbers.integers(step_key, t.shape, 1, steps + 1)
    on_step = random_numbers.happens(share_key, t.shape, _SHARE)
    return jnp.where(on_step, step_label(number, steps), t)


def velocity(predict: Callable, x_BTHWC: jax.Array, t_BT: jax.Array, steps: int) -> jax.Array:
    """What a student of so many steps has to predict.

    Args:
        predict: (samples, labels) → the teacher's velocities [B, T, H, W, C].
        x_BTHWC: noised samples.
        t_BT: their labels.
    """
    end_BT = _ends(t_BT, steps)
    middle_BT = (t_BT + end_BT) // 2
    first = predict(x_BTHWC, t_BT)
    halfway = _after(x_BTHWC, first, t_BT, middle_BT)
    there = _after(halfway, predict(halfway, middle_BT), middle_BT, end_BT)
    cos, sin = _turn(t_BT, end_BT)
    is_step = (end_BT < t_BT)[..., None, None, None]
    return jnp.where(is_step, (cos * x_BTHWC - there) / jnp.where(is_step, sin, 1), first)


def _ends(t: jax.Array, steps: int) -> jax.Array:
    """Where the step that begins at a label ends; the label itself where none does."""
    number = -(-(t + 1) * steps // NUM_LEVELS)  # the least whose label is not below t
    return jnp.where(step_label(number, steps) == t, step_label(number - 1, steps), t)


def _after(x, velocity, t, next_t):
    """DDIM from label t to another, a turn by the angle δ between them: cos δ · x − sin δ · v."""
    cos, sin = _turn(t, next_t)
    return cos * x - sin * velocity


def _turn(t, next_t):
    """Cosine and sine of the angle from a label to another, where cos² is the share of signal."""
    alpha_bars = jnp.append(jnp.asarray(schedule.alpha_bars()), 1.0)  # of −1, the last: clean
    now, after = (alpha_bars[label][..., None, None, None] for label in (t, next_t))
    signal, noise, next_signal, next_noise = map(jnp.sqrt, (now, 1 - now, after, 1 - after))
    return signal * next_signal + noise * next_noise, noise * next_signal - signal * next_noise
