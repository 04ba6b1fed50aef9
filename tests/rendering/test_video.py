"""Videos are read back as written, play everywhere, and are never half written."""

import weakref

import av
import numpy as np
import pytest
from PIL import Image

from cwm_jax.errors import UserError
from cwm_jax.rendering import video


def plain(colour, height=46, width=62):
    return np.full((height, width, 3), colour, np.uint8)


COLOURS = [(200, 30, 40), (20, 180, 60), (30, 60, 220), (247, 185, 66), (0, 0, 0), (255,) * 3]


def test_colours_order_and_size_survive(tmp_path):
    path = tmp_path / "new" / "video.mp4"
    video.write_mp4(path, [plain(colour) for colour in COLOURS], fps=7)
    found = video.read_mp4(path)
    assert found.shape == (6, 46, 62, 3)
    for frame, colour in zip(found, COLOURS, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 6


def test_a_detailed_picture_survives(tmp_path):
    frame = np.repeat(
        np.repeat(np.random.default_rng(0).integers(60, 200, (11, 13, 1)), 4, 0), 4, 1
    )
    frame = np.broadcast_to(frame, (44, 52, 3)).astype(np.uint8)
    video.write_mp4(tmp_path / "video.mp4", [frame] * 3, fps=5)
    error = video.read_mp4(tmp_path / "video.mp4").astype(float) - frame
    assert np.sqrt((error**2).mean()) < 6


def test_it_is_h264_yuv420p_bt709_with_the_index_in_front(tmp_path):
    path = tmp_path / "video.mp4"
    video.write_mp4(path, [plain(c) for c in COLOURS], fps=15)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1
        assert stream.average_rate == 15
        assert stream.frames == 6
    contents = path.read_bytes()
    assert contents.index(b"moov") < contents.index(b"mdat")


def test_frames_are_encoded_one_by_one_and_a_failure_leaves_the_old_video(tmp_path):
    taken = []

    def frames():
        for i in range(200):
            if i == 150:
                raise KeyboardInterrupt
            frame = plain((i, i, i))
            taken.append(weakref.ref(frame))
            yield frame
            assert sum(ref() is not None for ref in taken) < 4

    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        video.write_mp4(path, frames(), fps=5)
    assert len(taken) == 150
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([plain((1, 2, 3), height=45)], "both sides must be even"),
        ([plain((1, 2, 3)), plain((1, 2, 3), width=64)], "in a video of"),
        ([plain((1, 2, 3)).astype(np.float32)], "float32"),
    ],
)
def test_unfit_frames_are_named_and_leave_no_file(tmp_path, frames, message):
    with pytest.raises(UserError, match=message):
        video.write_mp4(tmp_path / "video.mp4", frames, fps=5)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot write {tmp_path}"):
        video.write_mp4(tmp_path, [plain((1, 2, 3))], fps=5)


def test_a_missing_encoder_is_reported(tmp_path, monkeypatch):
    def missing(self, name, **kwargs):
        raise av.codec.codec.UnknownCodecError(name)

    class NoEncoders:
        add_stream = missing

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    monkeypatch.setattr(av, "open", lambda *args, **kwargs: NoEncoders())
    with pytest.raises(UserError, match="no libx264"):
        video.write_mp4(tmp_path / "video.mp4", [plain((1, 2, 3))], fps=5)


def test_pyavs_error_for_a_missing_encoder_is_caught():
    with pytest.raises(av.codec.codec.UnknownCodecError):
        av.codec.Codec("no-such-encoder", "w")


def test_reading_a_file_that_is_not_a_video_names_it(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name):
            video.read_mp4(tmp_path / name)


def test_png_is_exact(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    video.write_png(tmp_path / "picture.png", image)
    assert np.array_equal(np.array(Image.open(tmp_path / "picture.png")), image)


def test_a_gif_shows_every_frame(tmp_path):
    colours = np.array([[200, 30, 40], [20, 180, 60], [10, 40, 220], [250, 250, 250]], np.uint8)
    frames = [np.broadcast_to(c, (7, 11, 3)) for c in colours]
    video.write_video(tmp_path / "video.gif", iter(frames), fps=15)
    with Image.open(tmp_path / "video.gif") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (4, (11, 7), 0)
        for number, frame in enumerate(frames):
            picture.seek(number)
            assert picture.info["duration"] == 70
            off = np.asarray(picture.convert("RGB"), int) - frame
            assert np.abs(off).max() <= 4
    with pytest.raises(UserError, match="no frames"):
        video.write_video(tmp_path / "none.GIF", iter([]), fps=15)
    assert not (tmp_path / "none.GIF").exists()


@pytest.mark.parametrize("name", ["12:30.mp4", "http:video.mp4", "a:b/100%d?x#y.mp4", "pipe:1.gif"])
def test_names_that_look_like_addresses_are_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write_video(name, [plain((9, 8, 7))] * 2, fps=5)
    assert (tmp_path / name).stat().st_size > 100
    if name.endswith("mp4"):
        assert len(video.read_mp4(name)) == 2
