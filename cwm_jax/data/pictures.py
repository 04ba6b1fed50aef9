"""Pictures and videos from users, decoded to the pixels that a viewer or player shows."""

import itertools
import re
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms, ImageOps

from cwm_jax.errors import UserError

# What libraries raise for files that are damaged, or of another type than their names.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
VIDEO_ERRORS = (av.FFmpegError, OSError, IndexError, ValueError)

_NUMBER = re.compile(r"([0-9]+)")
_DECIMAL = re.compile(r"(?<![0-9.])[0-9]+\.[0-9]+(?![0-9.])")


def in_order(paths: list[Path]) -> list[Path]:
    """Numbered files by their numbers: `9.png` before `10.png`, with or without leading zeros.

    Raises:
        UserError: two files have the same number, or names such as `1.5` and `1.25` are ambiguous:
            decimals, or a 5th and a 25th file.
    """
    keyed = sorted((_by_number(path.stem), path) for path in paths)
    ordered = [path for _, path in keyed]
    for (one, a), (other, b) in itertools.pairwise(keyed):
        if one == other:
            raise UserError(
                f"{a} and {b} have the same number, so their order is unknown: rename one of them"
            )
    for a, b in itertools.pairwise(ordered):
        if _falls_as_decimal(a.stem, b.stem):
            raise UserError(
                f"the order of {b} and {a} is unknown, since their numbers may be decimals: rename "
                f"the pictures to 0001.png, 0002.png, …"
            )
    return ordered


def _by_number(stem: str) -> list[str | int]:
    """Alternating text and numbers, text first, so that keys of different names compare."""
    return [int(p) if i % 2 else p for i, p in enumerate(_NUMBER.split(stem))]


def _falls_as_decimal(before: str, after: str) -> bool:
    """Whether two names in order by integers are out of order by decimals."""
    one, other = _DECIMAL.findall(before), _DECIMAL.findall(after)
    if _DECIMAL.sub("", before) != _DECIMAL.sub("", after):
        return False
    return [float(x) for x in one] >= [float(x) for x in other] if one else False


def read_picture(source: Path | BytesIO, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """A picture file as RGB of 8 bits; see `as_shown`. Raises `PICTURE_ERRORS`."""
    with Image.open(source, formats=formats) as picture:
        return as_shown(picture)


def as_shown(picture: Image.Image) -> Image.Image:
    """A picture as viewers show it, in RGB of 8 bits.

    Its orientation (EXIF) and colour profile are applied, deep greys are scaled to 8 bits, and
    what is transparent is black.
    """
    profile = picture.info.get("icc_profile")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _from_deep_grey(picture)
    if picture.has_transparency_data:
        picture = _over_black(picture.convert("RGBA"))
    return _in_srgb(picture, profile).convert("RGB")


def _from_deep_grey(picture: Image.Image) -> Image.Image:
    """16 bits a sample to 8, by value; a transparent grey (PNG's tRNS) becomes black."""
    samples = np.asarray(picture)
    if samples.dtype.kind == "f":
        raise ValueError("its samples are floating point; integers of 8 or 16 bits are supported")
    samples = samples.astype(np.int64)
    if (clear := picture.info.get("transparency")) is not None:
        samples = np.where(samples == clear, 0, samples)
    return Image.fromarray(((samples.clip(0, 65535) + 128) // 257).astype(np.uint8))


def _over_black(picture: Image.Image) -> Image.Image:
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture).convert("RGB")


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts colours of another profile, such as a telephone's Display P3, to sRGB."""
    if not profile or picture.mode not in ("RGB", "CMYK"):
        return picture
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # viewers also ignore it
        return picture


def video_frames(path: Path) -> Iterator[Callable[[], Image.Image]]:
    """Functions that convert each frame of a video, so that skipped frames cost no conversion.

    Raises `VIDEO_ERRORS`.
    """
    # Absolute, since libav reads `take:1.mp4` as an address of the protocol `take`.
    with av.open(str(path.absolute())) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("it has no video stream")
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield lambda frame=frame: _as_played(frame, stream.sample_aspect_ratio)


def _as_played(frame: av.VideoFrame, pixel_shape) -> Image.Image:
    """A frame as players show it: pixels made square, rotated by its display matrix."""
    if any(component.is_alpha for component in frame.format.components):
        picture = _over_black(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        picture = frame.to_image()
    if pixel_shape and pixel_shape != 1:
        width = max(1, round(picture.width * pixel_shape))
        picture = picture.resize((width, picture.height), Image.Resampling.BOX)
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return _displayed(picture, bytes(data))
    return picture


# (right, down) of the coded picture point so on the screen.
_TURNS = {
    ((1, 0), (0, 1)): None,
    ((0, 1), (-1, 0)): Image.Transpose.ROTATE_270,
    ((-1, 0), (0, -1)): Image.Transpose.ROTATE_180,
    ((0, -1), (1, 0)): Image.Transpose.ROTATE_90,
    ((-1, 0), (0, 1)): Image.Transpose.FLIP_LEFT_RIGHT,
    ((1, 0), (0, -1)): Image.Transpose.FLIP_TOP_BOTTOM,
    ((0, 1), (1, 0)): Image.Transpose.TRANSPOSE,
    ((0, -1), (-1, 0)): Image.Transpose.TRANSVERSE,
}


def _displayed(picture: Image.Image, matrix: bytes) -> Image.Image:
    """Rotated and mirrored by a display matrix: nine int32, of which a, b, c, d rotate and scale.

    See libavutil's display.h: the point (x, y) is shown at (a·x + c·y, b·x + d·y).
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    size = max(abs(a), abs(b), abs(c), abs(d), 1)
    turn = tuple((round(x / size), round(y / size)) for x, y in ((a, b), (c, d)))
    slanted = any(0.01 < abs(x) / size < 0.99 for x in (a, b, c, d))
    if slanted or turn not in _TURNS:
        raise ValueError(
            f"its display matrix {a} {b} {c} {d} rotates or distorts it; only rotations by "
            f"90°, 180°, 270° and mirroring are supported: convert the video once with ffmpeg"
        )
    return picture if _TURNS[turn] is None else picture.transpose(_TURNS[turn])
