"""Writes and reads videos (mp4, GIF) and pictures (PNG)."""

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image

from cwm_jax.errors import UserError
from cwm_jax.files import written_whole

SUFFIXES = (".mp4", ".gif")  # of the videos that `write_video` writes
PNG_SUFFIX = ".png"
_INDEX_FIRST = {"movflags": "+faststart"}
_BT709 = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}


def write_mp4(path: str | os.PathLike, frames: Iterable[np.ndarray], *, fps: int) -> None:
    """Writes an H.264 video for browsers and phones, atomically.

    Frames are encoded one by one, so they need not be kept; near-lossless (CRF 17), yuv420p,
    BT.709, with the index at the front of the file.

    Args:
        path: where to write; folders are created.
        frames: uint8 images [H, W, 3], all of one size, both sides even; at least one.
        fps: frames a second.

    Raises:
        UserError: `path` cannot be written, the frames are not as above, or this build of PyAV
            has no H.264 encoder.
    """
    av = _pyav()
    with (
        written_whole(path) as temporary,
        av.open(_absolute(temporary), "w", format="mp4", options=_INDEX_FIRST) as container,
    ):
        stream = None
        for frame in frames:
            if stream is None:
                stream = _h264_stream(av, container, frame, fps)
            if frame.shape != (stream.height, stream.width, 3) or frame.dtype != np.uint8:
                raise UserError(
                    f"{path}: a frame is {frame.dtype} {frame.shape} in a video of "
                    f"uint8 {(stream.height, stream.width, 3)}"
                )
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", **_BT709)))
        if stream is None:
            raise UserError(f"{path}: there are no frames to write; a video has at least one")
        container.mux(stream.encode(None))


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], *, fps: int) -> None:
    """`write_gif` where the path ends in .gif, else `write_mp4`."""
    write = write_gif if os.fspath(path).lower().endswith(".gif") else write_mp4
    write(path, frames, fps=fps)


def write_gif(path: str | os.PathLike, frames: Iterable[np.ndarray], *, fps: int) -> None:
    """Writes an endlessly repeating GIF, atomically.

    256 colours, the same for all frames; a frame lasts a whole number of 10 ms, so the video has
    14.3 frames a second for `fps` 15, and at most 50.

    Args:
        path: where to write; folders are created.
        frames: uint8 images [H, W, 3], all of one size; at least one.
        fps: frames a second.

    Raises:
        UserError: `path` cannot be written, or there are no frames.
    """
    with written_whole(path) as temporary:
        images = [Image.fromarray(frame) for frame in frames]
        if not images:
            raise UserError(f"{path}: there are no frames to write; a video has at least one")
        shown = np.concatenate([np.asarray(image) for image in images[:: len(images) // 16 + 1]])
        palette = Image.fromarray(shown).quantize(256)
        first, *rest = (im.quantize(palette=palette, dither=Image.Dither.NONE) for im in images)
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=max(round(100 / fps), 2) * 10,
            loop=0,
            optimize=False,
        )


def read_mp4(path: str | os.PathLike) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3].

    Raises:
        UserError: there is no readable video at `path`.
    """
    av = _pyav()
    try:
        with av.open(_absolute(path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise UserError(f"cannot read a video from {path}: {error}") from error


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, 3], atomically.

    Raises:
        UserError: `path` cannot be written.
    """
    with written_whole(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _pyav():
    """PyAV, imported only for videos: training does not need it."""
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV, which is not installed: pip install av") from None
    return av


def _absolute(path: str | os.PathLike) -> str:
    """An absolute path: libav reads `12:30.mp4` as a URL with the protocol `12`."""
    return os.path.abspath(path)


def _h264_stream(av, container, frame: np.ndarray, fps: int):
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"video frames of {height}×{width} pixels; both sides must be even")
    try:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
    except (av.codec.codec.UnknownCodecError, av.FFmpegError) as error:
        raise UserError(
            "this build of PyAV has no libx264 encoder; install one that has: pip install av"
        ) from error
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    # Players guess the colour space of untagged videos by their size.
    codec = stream.codec_context
    codec.colorspace, codec.color_range = 1, 1  # BT.709, limited range
    codec.color_primaries, codec.color_trc = 1, 1
    return stream
