"""Renders the arrow keys that an action holds, and defines the colours of all pictures."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cwm_jax import coinrun

BACKDROP = (18, 20, 26)
LINE = (42, 46, 58)
KEY_FACE = (33, 37, 47)
KEY_EDGE = (58, 64, 79)
DIM = (122, 131, 150)
BRIGHT = (226, 230, 238)
ACCENT = (247, 185, 66)  # the gold of the coin

MIN_WIDTH = 64
_OVERSAMPLING = 8  # shapes are rendered this much larger, then reduced: smooth edges at any size
_PLACES = {"up": (1, 0), "left": (0, 1), "down": (1, 1), "right": (2, 1)}  # column, row
_ARROWS = {  # triangles in a key's unit square
    "up": ((0.5, 0.32), (0.7, 0.64), (0.3, 0.64)),
    "down": ((0.5, 0.68), (0.3, 0.36), (0.7, 0.36)),
    "left": ((0.32, 0.5), (0.64, 0.3), (0.64, 0.7)),
    "right": ((0.68, 0.5), (0.36, 0.7), (0.36, 0.3)),
}


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font, so no system font is needed; `size` in pixels."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=1024)
def keyboard_panel(action: int, *, width: int = 128) -> np.ndarray:
    """The arrow keys with the held ones lit, and the action's name beneath.

    Args:
        action: 0…14; anything else, such as `NO_ACTION`, lights nothing and is shown as a dash.
        width: pixels, at least 64.

    Returns:
        A read-only uint8 image [panel_height(width), width, 3].
    """
    if width < MIN_WIDTH:
        raise ValueError(f"a keyboard panel is at least {MIN_WIDTH} pixels wide, not {width}")
    key, gap, text_size = _sizes(width)
    panel = Image.new("RGB", (width, panel_height(width)), BACKDROP)
    keys = _arrow_keys(coinrun.action_keys(action), key, gap)
    panel.paste(keys, ((width - keys.width) // 2, gap))

    name = shown_name(action)
    while text_size > 7 and font(text_size).getlength(name) > width - 4:
        text_size -= 1
    quiet = action == coinrun.NOOP or not 0 <= action < coinrun.NUM_ACTIONS
    baseline = panel.height - max(4, text_size // 3)
    ImageDraw.Draw(panel).text(
        (width / 2, baseline), name, DIM if quiet else BRIGHT, font(text_size), anchor="ms"
    )
    pixels = np.array(panel)
    pixels.setflags(write=False)  # the cache hands the same array to every caller
    return pixels


def shown_name(action: int) -> str:
    """The action's name in characters of the font, which has no dash."""
    return coinrun.action_name(action).replace("–", "-")


def panel_height(width: int) -> int:
    """The height of a `keyboard_panel` of this width in pixels; always even."""
    key, gap, text_size = _sizes(width)
    height = gap + 2 * key + gap + round(1.9 * text_size)
    return height + height % 2


def _sizes(width: int) -> tuple[int, int, int]:
    """Side of a key, gap between keys, and text size, in pixels."""
    key = min(max(width // 8, 12), 26)
    return key, max(2, key // 8), min(max(width // 11, 9), 15)


def _arrow_keys(held: coinrun.Keys, key: int, gap: int) -> Image.Image:
    pitch = key + gap
    size = (2 * pitch + key, pitch + key)
    big = Image.new("RGB", tuple(side * _OVERSAMPLING for side in size), BACKDROP)
    canvas = ImageDraw.Draw(big)
    for name, (column, row) in _PLACES.items():
        lit = getattr(held, name)
        left, top = column * pitch * _OVERSAMPLING, row * pitch * _OVERSAMPLING
        side = key * _OVERSAMPLING
        canvas.rounded_rectangle(
            (left, top, left + side - 1, top + side - 1),
            radius=side * 0.22,
            fill=ACCENT if lit else KEY_FACE,
            outline=ACCENT if lit else KEY_EDGE,
            width=_OVERSAMPLING,
        )
        arrow = [(left + x * side, top + y * side) for x, y in _ARROWS[name]]
        canvas.polygon(arrow, fill=BACKDROP if lit else DIM)
    return big.resize(size, Image.Resampling.BOX)
