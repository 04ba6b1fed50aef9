"""Saves a session: as a video with the keys below the picture, or as arrays."""

import json
from pathlib import Path

import numpy as np

from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.data import npz
from cwm_jax.play.session.session import Session
from cwm_jax.rendering import video
from cwm_jax.rendering.contact_sheet import Sheet

_SCALE = 6


def write_video(session: Session, path: Path, *, start: int, stop: int, fps: int) -> None:
    """Writes frames `start` … `stop` − 1 with the keys; raises `UserError` like `video`."""
    history = session.history
    sheet = Sheet.fitting(1, FRAME_SHAPE[:2], with_real=False, scale=_SCALE, known=session.known)
    pictures = (
        sheet.render(
            history.frame(number)[None],
            np.array([history.actions[number]]),
            given=number < history.given,
            caption=f"{number + 1 - start} / {stop - start}",
        )
        for number in range(start, stop)
    )
    video.write_mp4(path, pictures, fps=fps)


def write_numbers(session: Session, path: Path, *, start: int, stop: int) -> None:
    """Writes npz: frames uint8 [T, H, W, C], actions int32 [T], steps, lanes, and the first frame.

    `controls` holds the description of the actions as in `metadata.json`.
    """
    history = session.history
    programs = [program or (0, 0) for program in history.programs[start:stop]]
    steps, lanes = np.array(programs, np.int32).T
    arrays = dict(
        frames=np.stack(list(history.frames(start, stop))),
        actions=np.array(history.actions[start:stop], np.int32),
        steps=steps,
        lanes=lanes,
        controls=json.dumps(session.known.to_json()),
        seed=np.uint32(session.seed),
        n_prompt=max(0, min(history.given, stop) - start),
        first_frame=start,
    )
    npz.write(path, arrays)
