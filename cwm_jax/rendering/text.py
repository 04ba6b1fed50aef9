"""Words on pictures in any script: no two letters look the same for want of a font.

Pillow's own font comes first, then matplotlib's, then one of the system's. A letter that none of
them has is written as its Unicode number, such as 8DF3.
"""

import functools
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont

_SMALLEST = 6  # pixels; smaller text cannot be read
_IN_NO_FONT = "\U0010ffff"  # no character, so it is drawn as fonts draw what they lack
_SECONDS = 10  # for the system to list its fonts


def width(words: str, size: int) -> float:
    """Pixels that words take at this size."""
    return sum(font.getlength(run) for font, run in _runs(words, size))


def draw(picture: ImageDraw.ImageDraw, spot, words: str, ink, size: int, *, anchor="mm", most=None):
    """Writes words.

    Args:
        spot: x and y of the anchor.
        size: in pixels.
        anchor: "mm", the middle of the words, or "lm", the middle of their left side.
        most: pixels that there are; longer words are written smaller.
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
    """The words in pieces that one font can write."""
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
    """A font that has the letter, and the letter; else the usual font, and the letter's number."""
    if unicodedata.category(letter)[0] != "C":  # control characters and the like draw nothing
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
        except OSError:  # pictures of one size, as colour emoji are
            continue


@functools.cache
def _of_matplotlib(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # only where it is wanted: most names need Pillow's own font alone

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)


@functools.cache
def _of_system(letter: str) -> tuple[str, ...]:
    """Files of the system's fonts that should have the letter; none where it cannot list them."""
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
