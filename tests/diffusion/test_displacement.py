"""Discrete displacements: their copies, the best ones, and their targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.diffusion import displacement
from cwm_jax.models.config import Reach

REACH = Reach(down=3, across=2, patch=4)
STAY = REACH.count // 2


@pytest.fixture(scope="module")
def last():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16, 3)), jnp.float32)


def number(rows: int, columns: int) -> int:
    return (rows + REACH.down) * (2 * REACH.across + 1) + columns + REACH.across


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (3, 0), (-3, 2), (1, -2)])
def test_a_displaced_frame_is_the_last_frame_shifted_with_its_edge_repeated(last, rows, columns):
    chosen = jnp.full((2, 3, 4, 4), number(rows, columns))
    padded = np.pad(last, [(0, 0), (0, 0), (3, 3), (3, 3), (0, 0)], mode="edge")
    wanted = padded[:, :, 3 + rows : 19 + rows, 3 + columns : 19 + columns]
    np.testing.assert_array_equal(displacement.warp(last, chosen, REACH), wanted)


def test_each_patch_moves_by_its_own_displacement_and_the_best_ones_are_found(last):
    rng = np.random.default_rng(1)
    chosen = jnp.asarray(rng.integers(REACH.count, size=(2, 3, 4, 4)), jnp.int32)
    warped = displacement.warp(last, chosen, REACH)
    errors = displacement.errors(last, warped, REACH)
    best = displacement.best(errors, REACH)
    np.testing.assert_array_equal(displacement.warp(last, best, REACH), warped)
    inner = np.s_[:, :, 1:-1, 1:-1]  # at the edge several displacements show the same
    np.testing.assert_array_equal(best[inner], chosen[inner])
    np.testing.assert_array_equal(errors.argmin(-1)[inner], displacement.best(errors, REACH)[inner])


def test_errors_are_those_of_the_warped_frames(last):
    target = jnp.flip(last, axis=1)
    errors = displacement.errors(last, target, REACH)
    for k in (0, 7, STAY, REACH.count - 1):
        warped = displacement.warp(last, jnp.full((2, 3, 4, 4), k), REACH)
        squares = np.square(warped - target).reshape(2, 3, 4, 4, 4, 4, 3).sum((3, 5, 6))
        np.testing.assert_allclose(errors[..., k], squares, rtol=1e-4)


def test_of_equally_good_displacements_the_smallest_is_the_target(last):
    flat = jnp.zeros_like(last)
    errors = displacement.errors(flat, flat, REACH)
    assert (displacement.best(errors, REACH) == STAY).all()
    targets = displacement.targets(errors, REACH)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
    assert (targets.argmax(-1) == STAY).all()
    exact = displacement.targets(displacement.errors(last, last, REACH), REACH)
    assert exact[:, :, 1:3, 1:3, STAY].min() > 0.99


def test_logits_of_tokens_become_those_of_their_patches():
    reach, grid = Reach(1, 0, 2), 2  # 3 displacements, 2 × 2 patches in each of 2 × 2 tokens
    logits = jnp.arange(4 * 12.0).reshape(1, 1, 4, 12)
    by_patch = displacement.to_grid(logits, grid, reach)
    assert by_patch.shape == (1, 1, 4, 4, 3)
    assert by_patch[0, 0, 0, 1].tolist() == [3, 4, 5]  # the first token's upper right patch
    assert by_patch[0, 0, 1, 0].tolist() == [6, 7, 8]  # its lower left
    assert by_patch[0, 0, 0, 2].tolist() == [12, 13, 14]  # the next token's first


def test_no_gradient_reaches_the_last_frame_s_choice_but_one_reaches_its_pixels(last):
    chosen = jnp.full((2, 3, 4, 4), STAY)
    grad = jax.grad(lambda x: displacement.warp(x, chosen, REACH).sum())(last)
    np.testing.assert_array_equal(grad, np.ones_like(last))
