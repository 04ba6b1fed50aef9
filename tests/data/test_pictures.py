"""Frames of recordings are in order, with the pixels that a viewer or player shows."""

import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from cwm_jax.data import user_recordings
from cwm_jax.errors import UserError
from cwm_jax.play.session import prompt_sources

RED, BLUE, GREEN, BLACK = (230, 0, 0), (0, 0, 230), (0, 230, 0), (0, 0, 0)


def read(path):
    return list(user_recordings.read_frames(path, fit="pad", every=1))


def levels(folder):
    return [int(frame[0, 0, 0]) for frame in read(folder)]


@pytest.mark.parametrize("name", ["{}", "frame{}", "Screenshot ({})", "take 2 part {} of 120"])
def test_pictures_come_by_their_numbers(tmp_path, name):
    for number in (1, 2, 9, 10, 11, 100, 119):
        Image.new("RGB", (64, 64), (2 * number,) * 3).save(tmp_path / f"{name.format(number)}.png")
    assert levels(tmp_path) == [2, 4, 18, 20, 22, 200, 238]


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("0.9", "1.1", "1.2"), True),
        (("1305031102.175304", "1305031102.211214", "1305031103.011215"), True),
        (("shot 9.5.59", "shot 9.10.00", "shot 10.1.1"), True),
        (("1.5", "1.25", "2.0"), False),
        (("1", "01", "2"), False),
    ],
)
def test_an_ambiguous_order_of_names_is_refused(tmp_path, names, known):
    for number, name in enumerate(names):
        Image.new("RGB", (64, 64), (number,) * 3).save(tmp_path / f"{name}.png")
    if known:
        assert levels(tmp_path) == [0, 1, 2]
        return
    with pytest.raises(UserError, match="order") as error:
        read(tmp_path)
    assert all(str(tmp_path / f"{name}.png") in str(error.value) for name in names[:2])


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def in_16_bits(channels):
    """A PNG of 16 bits a sample, which Pillow writes for greys alone."""
    samples = np.repeat((RAMP * 65535).round().astype(np.uint16)[:, :, None], channels, axis=2)
    if channels == 4:
        samples[..., 3] = 65535
    pixel_format = {1: "gray16be", 3: "rgb48be", 4: "rgba64be"}[channels]
    frame = av.VideoFrame.from_ndarray(
        samples[..., 0] if channels == 1 else samples,
        format=pixel_format.replace("be", "le"),
    )
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = 64, 64, pixel_format
    codec.time_base = Fraction(1, 15)
    return b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_pictures_keep_their_brightness(tmp_path, channels):
    raw = in_16_bits(channels)
    (tmp_path / "0.png").write_bytes(raw)
    for frame in (read(tmp_path)[0], prompt_sources.from_picture(raw).frames_PHWC[0]):
        assert np.abs(frame - RAMP[:, :, None] * 255).max() <= 1


def saved(picture, kind="PNG", **more):
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def half_clear():
    """Blue at the left; at the right a loud colour that is wholly transparent."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (*BLUE, 255)
    pixels[:, 32:] = (255, 0, 255, 0)
    return Image.fromarray(pixels)


def by_key_colour():
    """The same by a colour that counts as transparent."""
    return half_clear().convert("RGB"), {"transparency": (255, 0, 255)}


@pytest.mark.parametrize(
    "raw",
    [
        saved(half_clear()),
        saved(by_key_colour()[0], **by_key_colour()[1]),
        saved(half_clear(), "WEBP", lossless=True, exact=True),
        saved(half_clear().quantize(4)),
    ],
    ids=["RGBA", "key colour", "WebP", "palette"],
)
def test_transparent_pixels_are_black(tmp_path, raw):
    frame = prompt_sources.from_picture(raw).frames_PHWC[0]
    assert (frame[0, 0], frame[0, 63]) == (pytest.approx(BLUE), pytest.approx(BLACK))
    if raw.startswith(b"\x89PNG"):
        (tmp_path / "0.png").write_bytes(raw)
        assert np.array_equal(read(tmp_path)[0], frame)


def test_a_transparent_deep_grey_is_black(tmp_path):
    picture = Image.fromarray(np.full((64, 64), 40_000, np.uint16))
    picture.putpixel((0, 0), 65535)
    picture.save(tmp_path / "0.png", transparency=65535)
    frame = read(tmp_path)[0]
    assert frame[0, 0].tolist() == [0, 0, 0]
    assert frame[5, 5].tolist() == [156] * 3


def red_over_blue():
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(BLUE, (0, 32, 64, 64))
    return picture


# The number in a file's EXIF, and how the pixels are stored for it.
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_stand_upright(tmp_path, orientation, stored, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = saved(red_over_blue().transpose(stored), kind, exif=exif)
    frames = [prompt_sources.from_picture(raw).frames_PHWC[0]]
    if kind == "PNG":
        (tmp_path / "0.png").write_bytes(raw)
        frames += read(tmp_path)
    for frame in frames:
        assert frame[8, 32] == pytest.approx(RED, abs=8)
        assert frame[56, 32] == pytest.approx(BLUE, abs=8)


def test_a_colour_profile_is_applied_and_a_broken_one_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    for profile, shown in ((srgb, RED), (exchanged, BLUE), (b"none", RED)):
        raw = saved(Image.new("RGB", (64, 64), RED), icc_profile=profile)
        pixel = prompt_sources.from_picture(raw).frames_PHWC[0, 0, 0]
        assert pixel == pytest.approx(shown, abs=30)


def video(path, picture, *, codec="libx264", pixels="yuv420p", shape=None):
    with av.open(os.path.abspath(path), "w", format="mov") as out:
        stream = out.add_stream(codec, rate=15)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
        if shape:
            stream.sample_aspect_ratio = shape
        form = "rgb24" if picture.shape[2] == 3 else "rgba"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=form)))
        out.mux(stream.encode(None))


def with_matrix(path, a, b, c, d):
    """Writes the display matrix into a video's track header (version 0)."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    raw[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


def left_right():
    """Red at the left, blue at the right, green along the top; 128×64."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :64], picture[:, 64:], picture[:16] = RED, BLUE, GREEN
    return picture


# For a matrix, where the green edge and the red half are on the screen.
@pytest.mark.parametrize(
    ("matrix", "green", "red"),
    [
        ((0, 1, -1, 0), "right", "top"),
        ((-1, 0, 0, -1), "bottom", "right"),
        ((0, -1, 1, 0), "left", "bottom"),
        ((-1, 0, 0, 1), "top", "right"),
        ((1, 0, 0, -1), "bottom", "left"),
        ((0, 1, 1, 0), "left", "top"),
        ((0, -1, -1, 0), "right", "bottom"),
    ],
)
def test_videos_are_turned_as_players_turn_them(tmp_path, matrix, green, red):
    video(tmp_path / "a.mp4", left_right())
    with_matrix(tmp_path / "a.mp4", *matrix)
    frame = next(user_recordings.read_frames(tmp_path / "a.mp4", fit="stretch", every=1))
    edges = {"top": frame[1], "bottom": frame[-2], "left": frame[:, 1], "right": frame[:, -2]}
    assert np.abs(edges[green] - np.array(GREEN)).max() < 40
    beyond = {"top": frame[8, 32], "bottom": frame[56, 32]}
    beyond |= {"left": frame[32, 8], "right": frame[32, 56]}
    assert beyond[red] == pytest.approx(RED, abs=40)


def test_a_slanted_video_is_refused(tmp_path):
    video(tmp_path / "a.mp4", left_right())
    with_matrix(tmp_path / "a.mp4", 1, 1, -1, 1)
    with pytest.raises(UserError, match=r"a\.mp4.*90°"):
        read(tmp_path / "a.mp4")


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    video(tmp_path / "a.mp4", np.full((64, 64, 3), 200, np.uint8), shape=2)
    frame = read(tmp_path / "a.mp4")[0]  # 128×64 on the screen, so padded above and below
    assert frame[8].max() < 10
    assert frame[32].min() > 190


def test_a_transparent_video_has_black_behind_it(tmp_path):
    video(tmp_path / "a.mov", np.asarray(half_clear()), codec="qtrle", pixels="argb")
    frame = read(tmp_path / "a.mov")[0]
    assert (frame[5, 5], frame[5, 60]) == (pytest.approx(BLUE), pytest.approx(BLACK))


def test_a_colon_in_a_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video("take:1.mp4", left_right())
    assert len(read(type(tmp_path)("take:1.mp4"))) == 3
