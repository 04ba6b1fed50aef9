"""The real simulator and the model side by side: the same start, then the same keys in both."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw

from cwm_jax.coinrun import NO_ACTION, NUM_ACTIONS
from cwm_jax.errors import UserError
from cwm_jax.evaluation import rollout_quality
from cwm_jax.evaluation.frame_scores import Scores, score
from cwm_jax.evaluation.generation import Generate
from cwm_jax.rendering import contact_sheet
from cwm_jax.rendering.arrow_keys import ACCENT, BACKDROP, BRIGHT, DIM, LINE, font
from cwm_jax.runtime import random_numbers

# (level seed, actions) of each run → uint8 frames [n + 1, H, W, C] of each: the level's first
# frame, then one an action; fewer where the level ended.
Replay = Callable[[Sequence[tuple[int, Sequence[int]]]], list[np.ndarray]]

_GRAPH, _MARGIN, _TEXT = 110, 8, 12  # pixels
_TOP = 45.0  # dB, the upper end of the graph


class Loop(NamedTuple):
    """B levels played T frames long, in the game and in the model."""

    levels: list[int]
    real: np.ndarray  # uint8 [B, T, H, W, C]
    generated: np.ndarray  # uint8 [B, T, H, W, C]; the prompt first, from the game
    actions: np.ndarray  # int32 [B, T], the action that led into each frame
    scores: Scores  # of the T − P frames after the prompt
    n_prompt: int


def check(*, levels: int, frames: int, n_prompt: int) -> None:
    """Raises a UserError if there are no levels, or no frames are left to generate."""
    if levels < 1:
        raise UserError(f"levels={levels}: must be 1 or more")
    if not 1 <= n_prompt < frames:
        raise UserError(f"{n_prompt} of {frames} frames given leave none to generate")


def random_keys(count: int, frames: int, *, seed: int) -> np.ndarray:
    """Uniform random actions, as in the dataset: int32 [count, frames]."""
    return np.random.default_rng(seed).integers(NUM_ACTIONS, size=(count, frames), dtype=np.int32)


def play(
    generate: Generate,
    replay: Replay,
    levels: Sequence[int],
    keys: np.ndarray,
    *,
    n_prompt: int,
    seed: int,
) -> Loop:
    """Plays `keys` [B, T − 1] in each level, in the game and, after `n_prompt` frames, the model.

    Levels in which the player dies or wins before the end are left out: the game then continues
    with another level, which the model cannot predict.

    Raises:
        UserError: no level lasts long enough, or there are no frames left to generate.
    """
    length = keys.shape[1] + 1
    check(levels=len(keys), frames=length, n_prompt=n_prompt)
    played = replay([(level, row.tolist()) for level, row in zip(levels, keys, strict=True)])
    lasting = [i for i, frames in enumerate(played) if len(frames) == length]
    if not lasting:
        raise UserError(
            f"in all {len(played)} levels the player's game ended before {length} frames (the "
            f"longest had {max(map(len, played))}): request fewer frames or more levels"
        )
    real = np.stack([played[i] for i in lasting])
    actions = np.pad(keys[lasting], ((0, 0), (1, 0)), constant_values=NO_ACTION)
    prompt = real[:, :n_prompt]
    generated = np.asarray(jax.device_get(generate(prompt, actions, random_numbers.key(seed))))
    return Loop(
        [int(levels[i]) for i in lasting],
        real,
        np.concatenate([prompt, generated], axis=1),
        actions,
        score(generated, real[:, n_prompt:], prompt[:, -1]),
        n_prompt,
    )


def video_images(loop: Loop) -> Iterator[np.ndarray]:
    """Video frames for `video.write_mp4`: game above, model below, keys, and PSNR over time."""
    psnr = rollout_quality.capped(loop.scores.psnr)
    frames = contact_sheet.side_by_side(
        loop.real, loop.generated, loop.actions, n_prompt=loop.n_prompt
    )
    for t, picture in enumerate(frames):
        done = max(0, t + 1 - loop.n_prompt)
        yield np.concatenate([picture, _graph(psnr, done, picture.shape[1])])


def _graph(psnr_BF: np.ndarray, done: int, width: int) -> np.ndarray:
    """PSNR of the frames so far: each level dim, their mean bright; [_GRAPH, width, 3]."""
    graph = Image.new("RGB", (width, _GRAPH), BACKDROP)
    pen = ImageDraw.Draw(graph)
    left, right = 4 * _MARGIN, width - _MARGIN
    top, bottom = 3 * _MARGIN, _GRAPH - _MARGIN
    height = lambda decibel: bottom - (bottom - top) * min(decibel, _TOP) / _TOP
    for decibel in (0, 20, 40):
        pen.line((left, height(decibel), right, height(decibel)), fill=LINE)
        pen.text((left - 4, height(decibel)), str(decibel), DIM, font(_TEXT - 2), anchor="rm")
    mean = psnr_BF.mean(0)
    now = f"PSNR {mean[done - 1]:.1f} dB" if done else "PSNR"
    pen.text((left, _MARGIN + 2), now, BRIGHT, font(_TEXT), anchor="lm")
    at = np.linspace(left, right, max(psnr_BF.shape[1], 2))
    for values, colour, thick in [*((row, DIM, 1) for row in psnr_BF), (mean, ACCENT, 2)]:
        points = [(x, height(v)) for x, v in zip(at, values[:done], strict=False)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=thick)
    return np.array(graph)
