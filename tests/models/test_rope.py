"""Rotary embedding: literal numbers, and relative positions."""

import jax
import numpy as np

from cwm_jax.models import rope


def test_temporal_angles():
    angles = rope.temporal_angles(np.array([0, 1, 10]), 8)
    expected = np.outer([0, 1, 10], [1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_spatial_angles():
    angles = rope.spatial_angles(3, 8)  # 9 tokens, 4 planes: two by row, two by column
    line = np.outer([-1, 0, 1], [np.pi, 128 * np.pi])
    for row in range(3):
        for column in range(3):
            expected = [*line[row], *line[column]]
            np.testing.assert_allclose(angles[3 * row + column], expected, rtol=1e-6)


def test_rotation_turns_planes_and_keeps_lengths():
    x = np.array([1.0, 0.0, 0.0, 2.0], np.float32)  # planes (1, 0) and (0, 2)
    turned = rope.rotate(x, np.array([np.pi / 2, np.pi / 2], np.float32))
    np.testing.assert_allclose(turned, [0, -2, 1, 0], atol=1e-6)


def test_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 16))
    score = lambda i, j: float(
        rope.rotate(q, rope.temporal_angles(i, 16)) @ rope.rotate(k, rope.temporal_angles(j, 16))
    )
    assert abs(score(3, 1) - score(29, 27)) < 1e-5
    assert abs(score(3, 1) - score(4, 1)) > 1e-3
