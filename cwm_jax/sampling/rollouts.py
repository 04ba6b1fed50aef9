"""Rollouts on paper: which clips they start from, which keys are pressed, and films of them."""

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
from cwm_jax.data import loader
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, tell
from cwm_jax.rendering import contact_sheet, video
from cwm_jax.sampling.sampler import Sampler

ACTION_SOURCES = ("gt", "random", "pattern")
_CHUNK = 16  # frames drawn in one call of the device; progress is shown after each


class Script(NamedTuple):
    """What rollouts are to show: B clips of T frames, the first `n_prompt` of them given."""

    real: np.ndarray | None  # uint8 [B, T, H, W, C]; None where the records are shorter than T
    prompt: np.ndarray  # uint8 [B, n_prompt, H, W, C]
    actions: np.ndarray  # int32 [B, T], the action that leads into each frame
    known: Controls  # what the game is played with

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
    """Picks `count` different episodes of a split, and the actions to take after their prompt.

    There are fewer where the split has no more that long, which is told, or where bad records are
    skipped.

    Args:
        source: "gt", those really taken; "random", uniform; "pattern", `pattern` over and over.

    Raises:
        UserError: where there is no episode that long, or an action does not exist.
    """
    if not 1 <= n_prompt < frames:
        raise UserError(
            f"{frames} frames with {n_prompt} given leave none to draw: need 1 ≤ given < frames"
        )
    episodes = loader.open_episodes(config, split, num_actions=num_actions)
    whole = episodes.lengths >= frames
    if source == "gt" and not whole.any():
        raise UserError(
            f"{frames} frames with the real actions: the longest episode of {config.dir}/{split} "
            f"has {episodes.lengths.max()}; ask for fewer, or for another source of actions"
        )
    count = _at_most(count, episodes, config, split, frames if source == "gt" else n_prompt)
    length = frames if whole.sum() >= count or source == "gt" else n_prompt
    numbers = loader.pick_episodes(episodes, count=count, length=length, seed=seed)
    numbers = loader.good_episodes(config, episodes, numbers, length=length)
    clips = loader.load_clips(episodes, numbers, length=length)
    actions = clips["actions"]
    if source != "gt":
        led_in = clips["actions"][:, :n_prompt]
        chosen = _chosen(source, (len(numbers), frames - n_prompt), pattern, num_actions, seed)
        actions = np.concatenate([led_in, chosen], axis=1)
    real = clips["frames"] if length == frames else None
    return Script(real, clips["frames"][:, :n_prompt], actions, controls.read(config.dir))


def _at_most(
    count: int, episodes: loader.Episodes, config: DataConfig, split: str, length: int
) -> int:
    """`count`, or as many episodes of `length` frames as there are."""
    there = int((episodes.lengths >= length).sum())
    if count <= there:
        return count
    tell(
        f"{config.dir}/{split} has {there} records of {length} frames: so many rollouts are drawn "
        f"instead of {count}"
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


def draw(sampler: Sampler, script: Script, *, key) -> Iterator[np.ndarray]:
    """Yields uint8 [B, H, W, C] for each of the T frames, those of the prompt first.

    The device draws the next frames while the caller is busy with the last ones. All its calls
    have one size, so they share one compiled program; what the last draws too much is dropped.

    Args:
        key: PRNG key of all noise.

    Raises:
        UserError: where prompt or actions do not fit the network.
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
    """Frames in each of the fewest equal calls that draw `wanted` frames, `_CHUNK` at most."""
    return math.ceil(wanted / math.ceil(wanted / _CHUNK))


def film(script: Script, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Film images for `video.write_film`: real on top, drawn below, the pressed keys under each."""
    samples, length = script.actions.shape
    shape = script.prompt.shape[2:4]
    page = contact_sheet.Sheet.fitting(
        samples, shape, with_real=script.real is not None, known=script.known
    )
    for t, frame_BHWC in enumerate(frames):
        yield page.draw(
            frame_BHWC,
            script.actions[:, t],
            real_BHWC=None if script.real is None else script.real[:, t],
            given=t < script.n_prompt,
            caption=f"{t + 1} / {length}",
        )


def write(
    sampler: Sampler, script: Script, path: Path, *, key, fps: int = FPS, watched: bool = False
) -> np.ndarray:
    """Draws a script and films it while it is drawn; returns all frames, uint8 [B, T, H, W, C].

    Args:
        path: of the film, mp4 or GIF by its ending.
        key: PRNG key of all noise.
        watched: somebody waits at a terminal: show a progress bar, then frames/s.
    """
    kept = []

    def keeping(frames):
        for frame in frames:
            kept.append(frame)
            yield frame

    frames = keeping(draw(sampler, script, key=key))
    shown = film(script, _watched(frames, script) if watched else frames)
    video.write_film(path, shown, fps=fps)
    return np.stack(kept, axis=1)


def _watched(frames: Iterator[np.ndarray], script: Script) -> Iterator[np.ndarray]:
    """Passes frames on under a progress bar; then says how fast they were drawn."""
    samples, length = script.actions.shape
    wanted = length - script.n_prompt
    began, compiled = time.perf_counter(), 0.0
    for t, frame in enumerate(tqdm(frames, total=length, unit=" frames", desc="drawing")):
        if t == script.n_prompt:  # the first call of the device is over, which had to compile
            compiled = time.perf_counter()
        yield frame
    seconds = time.perf_counter() - began
    later = samples * (wanted - _call_size(wanted))
    rate = later / (time.perf_counter() - compiled)
    tell(
        f"{samples} × {wanted} frames in {seconds:.1f} s, compiling included"
        + (f"; {rate:.1f} frames/s once compiled" if later else ""),
        file=sys.stdout,
    )
