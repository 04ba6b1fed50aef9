"""Real clips beside what the model makes of their first frames and actions."""

from pathlib import Path

import jax
import numpy as np

from cwm_jax import sheet, video
from cwm_jax.coinrun import FPS
from cwm_jax.sampler import Sampler


def complete(sampler: Sampler, frames_BTHWC, actions_BT, *, n_prompt: int, key) -> np.ndarray:
    """The first `n_prompt` frames, then T − n_prompt drawn ones, uint8 [B, T, H, W, C].

    Args:
        frames_BTHWC: uint8; only the prompt is looked at.
        actions_BT: the action that led into each frame.
        key: PRNG key of all noise.

    Raises:
        UserError: where prompt or actions do not fit the network.
    """
    prompt = np.asarray(frames_BTHWC)[:, :n_prompt]
    state = sampler.start(prompt, actions_BT[:, :n_prompt])
    _, drawn = sampler.rollout(state, actions_BT[:, n_prompt:], key)
    return np.concatenate([prompt, jax.device_get(drawn)], axis=1)


def write_pair(folder: Path, name: str, real, generated, actions, *, n_prompt: int):
    """Writes `name.mp4` and `name.png`, real frames over generated ones; returns both paths."""
    mp4, png = folder / f"{name}.mp4", folder / f"{name}.png"
    film = sheet.side_by_side(real, generated, actions, n_prompt=n_prompt)
    video.write_mp4(mp4, film, fps=FPS)
    video.write_png(png, sheet.grid(real, generated, n_prompt=n_prompt))
    return mp4, png
