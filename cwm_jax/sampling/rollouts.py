"""Rollouts from clips: their prompts and actions, the generated frames, and videos of them."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from cwm_jax import controls
from cwm_jax.coinrun import FPS
from cwm_jax.controls import Controls
from cwm_jax.data import splits
from cwm_jax.data.clips import Episodes
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, echo
from cwm_jax.rendering import contact_sheet, video
from cwm_jax.sampling.generator import Generator

ACTION_SOURCES = ("gt", "random", "pattern")
_CHUNK = 16  # frames generated in one device call; progress is shown after each


class Script(NamedTuple):
    """Inputs of rollouts: B clips of T frames, the first `n_prompt` of them given."""

    real: np.ndarray | None  # uint8 [B, T, H, W, C]; None where the records are shorter than T
    prompt: np.ndarray  # uint8 [B, n_prompt, H, W, C]
    actions: np.ndarray  # int32 [B, T], the action that leads into each frame
    known: Controls  # of the game

    @property
    def n_prompt(self) -> int:
        return self.prompt.shape[1]


def write_script(
    config: DataConfig,
    split: str,
    *,
    count: int,
    frames: int,
    n_prompt: int,
    num_actions: int,
    source: str = "gt",
    pattern: Sequence[int] = (),
    seed: int = 0,
) -> Script:
    """Chooses `count` different episodes of a split, and the actions after their prompt.

    There are fewer where the split has fewer long enough episodes, which is logged, or where bad
    records are skipped.

    Args:
        source: "gt", the recorded ones; "random", uniform; "pattern", `pattern` repeated.

    Raises:
        UserError: no episode is long enough, or an action does not exist.
    """
    if not 1 <= n_prompt < frames:
        raise UserError(
            f"{frames} frames with {n_prompt} given leave none to generate: need 1 ≤ given < frames"
        )
    episodes = splits.open_episodes(config, split, num_actions=num_actions)
    whole = episodes.lengths >= frames
    if source == "gt" and not whole.any():
        raise UserError(
            f"{frames} frames with the real actions: the longest episode of {config.dir}/{split} "
            f"has {episodes.lengths.max()}; ask for fewer, or for another source of actions"
        )
    count = _at_most(count, episodes, config, split, frames if source == "gt" else n_prompt)
    length = frames if whole.sum() >= count or source == "gt" else n_prompt
    numbers = splits.pick_episodes(episodes, count=count, length=length, seed=seed)
    numbers = splits.good_episodes(config, episodes, numbers, length=length)
    clips = splits.load_clips(episodes, numbers, length=length)
    actions = clips["actions"]
    if source != "gt":
        led_in = clips["actions"][:, :n_prompt]
        chosen = _chosen(source, (len(numbers), frames - n_prompt), pattern, num_actions, seed)
        actions = np.concatenate([led_in, chosen], axis=1)
    real = clips["frames"] if length == frames else None
    return Script(real, clips["frames"][:, :n_prompt], actions, controls.read(config.dir))


def _at_most(count: int, episodes: Episodes, config: DataConfig, split: str, length: int) -> int:
    """`count`, or as many episodes of `length` frames as there are."""
    there = int((episodes.lengths >= length).sum())
    if count <= there:
        return count
    echo(
        f"{config.dir}/{split} has {there} records of {length} frames: generating so many "
        f"rollouts instead of {count}"
    )
    return there


def _chosen(source: str, shape, pattern, num_actions: int, seed: int) -> np.ndarray:
    if source == "random":
        return np.random.default_rng(seed).integers(num_actions, size=shape, dtype=np.int32)
    if source != "pattern":
        raise UserError(f"actions from {source!r}: use one of {', '.join(ACTION_SOURCES)}")
    if not pattern:
        raise UserError("actions from a pattern: name the pattern, such as --pattern 7,7,7,8,8")
    for action in pattern:
        if not 0 <= action < num_actions:
            raise UserError(f"action {action} in the pattern: actions are 0…{num_actions - 1}")
    return np.broadcast_to(np.resize(np.int32(pattern), shape[1]), shape)


def generate(sampler: Generator, script: Script, *, key) -> Iterator[np.ndarray]:
    """Yields uint8 [B, H, W, C] for each of the T frames, those of the prompt first.

    The device generates the next frames while the caller processes the last ones. All calls have
    one size, so they share one compiled program; surplus frames of the last call are dropped.

    Args:
        key: PRNG key of all noise.

    Raises:
        UserError: prompt or actions do not fit the network.
    """
    wanted = script.actions.shape[1] - script.n_prompt
    size = _call_size(wanted)
    calls = math.ceil(wanted / size)
    actions = np.pad(
        script.actions[:, script.n_prompt :], ((0, 0), (0, calls * size - wanted)), mode="edge"
    )
    state = sampler.start(script.prompt, script.actions[:, : script.n_prompt])
    yield from np.moveaxis(script.prompt, 1, 0)
    ready = None
    for call in range(calls):
        state, frames = sampler.rollout(state, actions[:, call * size :][:, :size], key)
        if ready is not None:
            yield from np.moveaxis(jax.device_get(ready), 1, 0)
        ready = frames
    yield from np.moveaxis(jax.device_get(ready), 1, 0)[: size - (calls * size - wanted)]


def _call_size(wanted: int) -> int:
    """Frames per call when `wanted` frames take the fewest equal calls of at most `_CHUNK`."""
    return math.ceil(wanted / math.ceil(wanted / _CHUNK))


def video_images(script: Script, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Images for `video.write_video`: real frames above generated ones, with the pressed keys."""
    samples, length = script.actions.shape
    shape = script.prompt.shape[2:4]
    page = contact_sheet.Sheet.fitting(
        samples, shape, with_real=script.real is not None, known=script.known
    )
    for t, frame_BHWC in enumerate(frames):
        yield page.render(
            frame_BHWC,
            script.actions[:, t],
            real_BHWC=None if script.real is None else script.real[:, t],
            given=t < script.n_prompt,
            caption=f"{t + 1} / {length}",
        )


def write(
    sampler: Generator, script: Script, path: Path, *, key, fps: int = FPS, watched: bool = False
) -> np.ndarray:
    """Generates a script's frames and writes their video; returns them, uint8 [B, T, H, W, C].

    Args:
        path: of the video, mp4 or GIF by its suffix.
        key: PRNG key of all noise.
        watched: show a progress bar, then frames/s.
    """
    kept = []

    def keeping(frames):
        for frame in frames:
            kept.append(frame)
            yield frame

    frames = keeping(generate(sampler, script, key=key))
    images = video_images(script, _watched(frames, script) if watched else frames)
    video.write_video(path, images, fps=fps)
    return np.stack(kept, axis=1)


def _watched(frames: Iterator[np.ndarray], script: Script) -> Iterator[np.ndarray]:
    """Yields the frames under a progress bar; then prints how fast they were generated."""
    samples, length = script.actions.shape
    wanted = length - script.n_prompt
    began, compiled = time.perf_counter(), 0.0
    for t, frame in enumerate(tqdm(frames, total=length, unit=" frames", desc="generating")):
        if t == script.n_prompt:  # the first device call, which compiled, is over
            compiled = time.perf_counter()
        yield frame
    seconds = time.perf_counter() - began
    later = samples * (wanted - _call_size(wanted))
    rate = later / (time.perf_counter() - compiled)
    echo(
        f"{samples} × {wanted} frames in {seconds:.1f} s, including compilation"
        + (f"; {rate:.1f} frames/s after compilation" if later else ""),
        file=sys.stdout,
    )
