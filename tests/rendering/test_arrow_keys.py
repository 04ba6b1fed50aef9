"""The panel shows the keys of the action at any size."""

import numpy as np
import pytest

from cwm_jax import coinrun
from cwm_jax.rendering import arrow_keys


def lit_pixels(panel):
    """Which pixels have the accent colour: bool [H, W]."""
    return (panel == arrow_keys.ACCENT).all(-1)


@pytest.mark.parametrize("width", [64, 67, 128, 192, 601])
def test_the_size_is_as_documented_and_the_height_even(width):
    panel = arrow_keys.keyboard_panel(coinrun.JUMP, width=width)
    assert panel.shape == (arrow_keys.panel_height(width), width, 3)
    assert panel.shape[0] % 2 == 0
    assert panel.dtype == np.uint8


@pytest.mark.parametrize("width", [64, 193])
def test_lit_area_counts_the_held_keys(width):
    one = lit_pixels(arrow_keys.keyboard_panel(coinrun.JUMP, width=width)).sum()
    assert one > 50
    for action in range(-1, coinrun.NUM_ACTIONS):
        held = sum(coinrun.action_keys(action))
        lit = lit_pixels(arrow_keys.keyboard_panel(action, width=width)).sum()
        assert abs(lit - held * one) <= 0.1 * one


def test_lit_keys_are_at_their_places():
    centre_x = 64
    centre = {}
    for action in (coinrun.LEFT, coinrun.RIGHT, coinrun.JUMP):
        y, x = np.nonzero(lit_pixels(arrow_keys.keyboard_panel(action, width=2 * centre_x)))
        centre[action] = (x.mean(), y.mean())
    assert centre[coinrun.LEFT][0] < centre_x - 5
    assert centre[coinrun.RIGHT][0] > centre_x + 5
    assert abs(centre[coinrun.JUMP][0] - centre_x) < 2
    assert centre[coinrun.JUMP][1] < centre[coinrun.LEFT][1] - 5


def test_actions_without_arrows_still_differ_by_name():
    panels = {
        arrow_keys.keyboard_panel(action, width=64).tobytes()
        for action in range(-1, coinrun.NUM_ACTIONS)
    }
    assert len(panels) == coinrun.NUM_ACTIONS + 1


def test_every_name_fits_the_narrowest_panel():
    for action in range(-1, coinrun.NUM_ACTIONS):
        panel = arrow_keys.keyboard_panel(action, width=64)
        for edge in (panel[:, :3], panel[:, -3:], panel[0], panel[-1]):
            assert (edge == arrow_keys.BACKDROP).all(), coinrun.action_name(action)


def test_no_name_needs_a_letter_the_font_lacks():
    missing = np.array(arrow_keys.font(15).getmask("\U0010ffff"))
    for action in range(-1, coinrun.NUM_ACTIONS):
        for letter in arrow_keys.shown_name(action):
            assert not np.array_equal(arrow_keys.font(15).getmask(letter), missing), letter


def test_a_cached_panel_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        arrow_keys.keyboard_panel(0)[:] = 0


def test_too_narrow_is_refused():
    with pytest.raises(ValueError, match="at least 64"):
        arrow_keys.keyboard_panel(0, width=63)
