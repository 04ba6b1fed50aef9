"""Renders text of any script on pictures.

The fonts are Pillow's own, then matplotlib's, then the system's. A character that none of them has
is rendered as its Unicode number, such as 8DF3, so that names stay distinct.
"""

import functools
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont

_SMALLEST = 6  # pixels; smaller text cannot be read
_IN_NO_FONT = "\U0010ffff"  # not a character: rendered like any character that a font lacks
_SECONDS = 10  # limit for the system to list its fonts


def width(words: str, size: int) -> float:
    """The width of a text at this size in pixels."""
    return sum(font.getlength(run) for font, run in _runs(words, size))


def render(
    picture: ImageDraw.ImageDraw, spot, words: str, ink, size: int, *, anchor="mm", most=None
):
    """Renders a text.

    Args:
        spot: x and y of the anchor.
        size: in pixels.
        anchor: "mm", the middle of the text, or "lm", the middle of its left side.
        most: available pixels; longer text is rendered smaller.
    """
    while most is not None and size > _SMALLEST and width(words, size) > most:
        size -= 1
    runs = list(_runs(words, size))
    if len(runs) == 1:
        picture.text(spot, runs[0][1], ink, runs[0][0], anchor=anchor)
        return
    x = spot[0] - (width(words, size) / 2 if anchor == "mm" else 0)
    for font, run in runs:
        picture.text((x, spot[1]), run, ink, font, anchor="lm")
        x += font.getlength(run)


def _runs(words: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Splits the words into runs of one font."""
    font, run = _usual(size), ""
    for letter in unicodedata.normalize("NFC", words):
        able, shown = _written(letter, size)
        if able is not font and run:
            yield font, run
            run = ""
        font, run = able, run + shown
    yield font, run


@functools.lru_cache(maxsize=4096)
def _written(letter: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font that has the letter, and the letter; else the default font and its number."""
    if unicodedata.category(letter)[0] != "C":  # control characters have no shape
        for font in _fonts(letter, size):
            if letter.isspace() or _has(font, letter):
                return font, letter
    return _usual(size), f" {ord(letter):X} "


@functools.cache
def _usual(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _fonts(letter: str, size: int) -> Iterator[ImageFont.FreeTypeFont]:
    yield _usual(size)
    yield _of_matplotlib(size)
    for path in _of_system(letter):
        try:
            yield ImageFont.truetype(path, size)
        except OSError:  # fonts of one size only, such as colour emoji
            continue


@functools.cache
def _of_matplotlib(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # imported on use: most names need only Pillow's font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)


@functools.cache
def _of_system(letter: str) -> tuple[str, ...]:
    """Font files of the system with the letter; none where it cannot list them."""
    if not (program := shutil.which("fc-list")):
        return ()
    command = [program, "--format", "%{file}\n", f":charset={ord(letter):x}"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(sorted(set(listed.decode(errors="surrogateescape").split("\n")) - {""}))


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return _shape(font, letter) != _shape(font, _IN_NO_FONT)


def _shape(font: ImageFont.FreeTypeFont, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
