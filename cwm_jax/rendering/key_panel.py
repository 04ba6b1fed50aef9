"""Renders the pressed keys of any game: arrow keys for Procgen's, else every key by name."""

import functools

import numpy as np
from PIL import Image, ImageDraw

from cwm_jax.controls import Control, Controls
from cwm_jax.rendering import arrow_keys, text

_CAP = 22  # height of a key in pixels
_PITCH = _CAP + 4
_NAME = 30  # height of the line with the action's name


@functools.lru_cache(maxsize=1024)
def render(known: Controls, action: int, *, width: int) -> np.ndarray:
    """A game's keys with the held ones lit, and the action's name beneath.

    Args:
        action: as in the data; `NO_ACTION` lights nothing.
        width: pixels, at least 64.

    Returns:
        A read-only uint8 image [height(known, width), width, 3].
    """
    if known.is_procgen:
        return arrow_keys.keyboard_panel(action, width=width)
    panel = Image.new("RGB", (width, height(known, width)), arrow_keys.BACKDROP)
    picture, held = ImageDraw.Draw(panel), known.held(action)
    for row, line in enumerate(_lines(known, width)):
        top = 4 + row * _PITCH
        for left, right, control in line:
            lit = control in held
            face = arrow_keys.ACCENT if lit else arrow_keys.KEY_FACE
            ink = arrow_keys.BACKDROP if lit else arrow_keys.DIM
            picture.rounded_rectangle((left, top, right, top + _CAP), 4, face, arrow_keys.KEY_EDGE)
            spot = ((left + right) / 2, top + _CAP / 2)
            text.render(picture, spot, control.name, ink, 11, most=right - left - 4)
    spot = (width / 2, panel.height - 12)
    text.render(picture, spot, known.name(action), arrow_keys.BRIGHT, 13, most=width - 8)
    pixels = np.array(panel)
    pixels.setflags(write=False)  # the cache hands the same array to every caller
    return pixels


def height(known: Controls, width: int) -> int:
    """The height of a panel of this width in pixels; always even."""
    if known.is_procgen:
        return arrow_keys.panel_height(width)
    return len(_lines(known, width)) * _PITCH + _NAME


def _lines(known: Controls, width: int) -> list[list[tuple[float, float, Control]]]:
    """The left and right edges of each key, in lines as wide as the panel."""
    lines, left = [[]], 4.0
    for control in known.controls:
        right = left + text.width(control.name, 11) + 12
        if right > width - 4 and lines[-1]:
            lines.append([])
            left, right = 4.0, right - left + 4
        right = min(right, width - 4)
        lines[-1].append((left, right, control))
        left = right + 4
    return lines
