"""Prompts of sessions, and harmful files that are refused."""

import struct
import zlib

import numpy as np
import pytest
from pictures import file_of, noise
from PIL import Image

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.errors import UserError
from cwm_jax.play.inference.engine import Lane
from cwm_jax.play.session import prompt_sources
from cwm_jax.play.session.episode_playback import RealClips
from cwm_jax.play.session.prompt_sources import ClipSource, PictureSource


def test_a_64_by_64_picture_is_taken_as_it_is():
    pixels = noise(64, 64)
    prompt = prompt_sources.from_picture(file_of(pixels))
    assert np.array_equal(prompt.frames_PHWC[0], pixels)
    assert prompt.actions_P.tolist() == [NO_ACTION]


def test_a_larger_picture_gives_its_middle():
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:, 64:192] = 200
    assert (prompt_sources.from_picture(file_of(pixels)).frames_PHWC == 200).all()


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP"])
def test_common_formats_are_read(kind):
    assert prompt_sources.from_picture(file_of(noise(64, 64), kind)).frames_PHWC.shape == (
        1,
        64,
        64,
        3,
    )


def test_files_that_are_not_pictures_or_too_large_are_refused(monkeypatch):
    unpacked = []
    monkeypatch.setattr(Image.Image, "convert", lambda *a: unpacked.append(a))
    with pytest.raises(UserError, match="4000×4000 pixels"):
        prompt_sources.from_picture(file_of(np.zeros((4000, 4000, 3), np.uint8)))
    assert not unpacked  # refused by its header
    monkeypatch.undo()
    whole = file_of(noise(64, 64))
    for raw in (b"", b"hello", whole[: len(whole) // 2], b"%PDF-1.7", b"\x89PNG\r\n\x1a\n" * 9):
        with pytest.raises(UserError, match="not a readable picture"):
            prompt_sources.from_picture(raw)
    with pytest.raises(UserError, match="bytes; at most"):
        prompt_sources.from_picture(bytes(prompt_sources.MAX_PICTURE_BYTES + 1))


def test_a_picture_that_claims_more_than_pillow_opens_is_too_large():
    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    with pytest.raises(UserError, match="far too large: at most 1024×1024"):
        prompt_sources.from_picture(bomb)
    with pytest.raises(UserError, match=r"in it is far too large, not \(64, 64\)"):
        prompt_sources._from_png(PictureSource(bomb))


def test_clips_are_found_by_number(clips):
    prompt = clips.load(ClipSource(23, 32))
    assert prompt.frames_PHWC.shape == (32, 64, 64, 3)
    assert (prompt.actions_P[0], len(prompt.actions_P)) == (-1, 32)
    assert prompt.checksum != clips.load(ClipSource(24, 32)).checksum
    for source, message in (
        (ClipSource(len(clips), 1), "no clip"),
        (ClipSource(-1, 1), "no clip -1"),
        (ClipSource(0, 33), "choose 1…32"),
        (ClipSource(0, 0), "choose 1…32"),
        (PictureSource(file_of(noise(32, 32))), "is \\(32, 32\\)"),
        (PictureSource(b"none"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            clips.load(source)


def test_the_demonstration_replays_the_real_episode(clips):
    generator = RealClips(clips)
    number = 40
    episode, start = clips.clips.locate(number)
    real = clips.episodes[episode].frames
    prompt = clips.load(ClipSource(number, 3))
    cache = generator.fresh()
    for frame in prompt.frames_PHWC:
        cache = generator.append(cache, frame, 0)
    for offset in range(3, 12):
        frame = generator.generate([Lane(cache, 7, 0, offset)], 1, 1)[0]
        assert np.array_equal(frame, real[(start + offset) % len(real)])
        cache = generator.append(cache, frame, 7)
