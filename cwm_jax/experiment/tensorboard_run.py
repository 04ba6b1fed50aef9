"""TensorBoard: the same numbers, pictures and videos as event files in the workdir."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cwm_jax.coinrun import FPS
from cwm_jax.errors import echo
from cwm_jax.rendering import video

FOLDER = "tensorboard"


class TensorBoardRun:
    """Writes event files, to be shown by `tensorboard --logdir`.

    TensorBoard shows no mp4: a video becomes an animated GIF among the images.

    Args:
        folder: of the event files; made if it is not there.
        run_config: the run's settings, shown as text.
        resume_step: the step of the checkpoint that training continues from; TensorBoard then hides
            what an earlier process reported of later steps. None for a new run.
    """

    def __init__(
        self, folder: Path, *, run_config: Mapping[str, Any], resume_step: int | None = None
    ):
        from tensorboardX import SummaryWriter  # not everyone uses it

        self._writer = SummaryWriter(
            str(folder),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=10,
            filename_suffix=f".{resume_step or 0:08d}",  # names tell seconds apart, and no less
        )
        settings = json.dumps(run_config, indent=2, sort_keys=True, default=str)
        self._writer.add_text("config", f"```json\n{settings}\n```", resume_step or 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def media(self, step: int, name: str, path: Path, kind: str) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        encoded = _as_gif(path) if kind == "video" else path.read_bytes()
        with Image.open(io.BytesIO(encoded)) as shown:
            width, height = shown.size
        picture = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=encoded
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self._writer.file_writer.add_summary(summary, step)

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


def open_tensorboard(
    workdir: Path, *, run_config: Mapping[str, Any], resume_step: int | None
) -> TensorBoardRun | None:
    """The event files of a workdir; None where they cannot be written, which is logged."""
    folder = workdir / FOLDER
    try:
        return TensorBoardRun(folder, run_config=run_config, resume_step=resume_step)
    except Exception as error:
        echo(f"WARNING: TensorBoard is off: {type(error).__name__}: {error}")
        return None


def _as_gif(path: Path) -> bytes:
    gif = path.with_name(f".{path.stem}.gif")
    try:
        video.write_gif(gif, video.read_mp4(path), fps=FPS)
        return gif.read_bytes()
    finally:
        gif.unlink(missing_ok=True)
