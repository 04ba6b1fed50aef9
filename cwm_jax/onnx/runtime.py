"""Generates frames from an ONNX export with onnxruntime: the sampler's window modes, in NumPy.

It shows what a program in any language has to do around the graphs. A world is its frames, their
actions, and the rotated keys and values of each at places 0, 1, 2 …
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.errors import UserError
from cwm_jax.models import rope
from cwm_jax.onnx import folder as export


@dataclasses.dataclass(frozen=True)
class World:
    """One world in progress; `cwm_jax.sampling.kv_cache.World` without its ring."""

    frames_FHWC: np.ndarray  # float32, F ≤ max_frames − 1, oldest first
    actions_F: np.ndarray  # int32, the action that led into each, −1 for none
    kv: dict[str, np.ndarray]  # keys_0 … values_0 …, each [F, S, N, K]


class OnnxGenerator:
    """Generates frames with an export.

    Args:
        folder: what `cwm_jax.tools.export --format onnx` made.
        steps: S, one of the export's.
        window: as in `cwm_jax.sampling.kv_cache`.
        threads: of onnxruntime; 0 leaves the choice to it.

    Raises:
        UserError: onnxruntime or a file is missing, a file is damaged, or S is not in the export.
    """

    def __init__(self, folder: Path, *, steps: int, window: str = "hop", threads: int = 0):
        self.about = export.read(folder)
        if steps not in self.about["steps"]:
            raise UserError(f"{folder} generates with {self.about['steps']} steps, not {steps}")
        self.steps, self._window = steps, window
        self.sizes: dict[str, Any] = self.about["network"]
        self._frame = _session(folder / f"frame-{steps}.onnx", threads)
        self._encode = _session(folder / "encode.onnx", threads)

    @property
    def slots(self) -> int:
        """Frames that the next one looks back on at most."""
        return self.sizes["max_frames"] - 1

    def start(self, frames_FHWC: np.ndarray, actions_F: np.ndarray) -> World:
        """A world that begins with these clean frames in [-1, 1]; the newest where too many."""
        frames_FHWC, actions_F = frames_FHWC[-self.slots :], actions_F[-self.slots :]
        size = self.sizes["image_size"]
        past = World(np.zeros((0, size, size, 3), np.float32), np.zeros(0, np.int32), {})
        return self._appended(past, frames_FHWC, actions_F)

    def step(self, world: World, action: int, noise_HWC: np.ndarray) -> tuple[World, np.ndarray]:
        """One frame on: (the older world, the frame, float32 [H, W, C], unclamped)."""
        lanes = self._lanes(world, np.array([action], np.int32))
        feeds = {"sample": noise_HWC[None].astype(np.float32)} | lanes
        if self.sizes["history"]:
            feeds["earlier"] = self._earlier(world.frames_FHWC)[None]
        _, frame_1HWC = self._frame.run(None, feeds)
        return self._advanced(world, frame_1HWC, np.array([action], np.int32)), frame_1HWC[0]

    def _advanced(self, world: World, frame_1HWC, action_1) -> World:
        frames = np.concatenate([world.frames_FHWC, frame_1HWC])
        actions = np.concatenate([world.actions_F, action_1])
        if len(world.frames_FHWC) < self.slots:
            return self._appended(world, frame_1HWC, action_1)
        if self._window == "cached":
            return self._slid(self._appended(world, frame_1HWC, action_1))
        keep = self.slots if self._window == "exact" else (self.slots + 1) // 2
        return self.start(frames[-keep:], actions[-keep:])

    def _appended(self, world: World, frames_THWC, actions_T) -> World:
        """The world with T frames more, encoded together."""
        feeds = {"frames": frames_THWC.astype(np.float32)} | self._lanes(world, actions_T)
        if self.sizes["history"]:
            every = [*world.frames_FHWC, *frames_THWC]
            first = len(world.frames_FHWC)
            before = [every[: max(first + t, 1)] for t in range(len(frames_THWC))]
            feeds["earlier"] = np.stack([self._earlier(frames) for frames in before])
        new = self._encode.run(None, feeds)
        kv = {
            name: np.concatenate([*([world.kv[name]] if world.kv else []), made])
            for name, made in zip(self._kv_names, new, strict=True)
        }
        joined = np.concatenate([world.frames_FHWC, frames_THWC.astype(np.float32)])
        return World(joined, np.concatenate([world.actions_F, actions_T]).astype(np.int32), kv)

    def _slid(self, world: World) -> World:
        """The world without its oldest frame, the others' keys one place earlier."""
        back = rope.temporal_angles(np.array([-1]), self._head_size)
        kv = {
            name: _turned(x[1:], back) if name.startswith("keys") else x[1:]
            for name, x in world.kv.items()
        }
        return World(world.frames_FHWC[1:], world.actions_F[1:], kv)

    def _lanes(self, world: World, actions_T: np.ndarray) -> dict[str, np.ndarray]:
        """Each of T new frames attends to the past and to those before it."""
        past, new = len(world.frames_FHWC), len(actions_T)
        attends = np.concatenate([np.ones((new, past)), np.tri(new)], axis=1)
        kv = world.kv
        if not past:  # one that nobody attends to
            shape = (1, self.sizes["tokens"], self.sizes["num_heads"], self._head_size)
            kv = {name: np.zeros(shape, np.float32) for name in self._kv_names}
            attends = np.concatenate([np.zeros((new, 1)), attends], axis=1)
        place = np.arange(past, past + new, dtype=np.int32)
        return {
            "action": actions_T.astype(np.int32),
            "place": place,
            "attends": attends.astype(np.float32),
        } | kv

    def _earlier(self, frames) -> np.ndarray:
        """The newest frames, newest first, the oldest repeated: float32 [history, H, W, C]."""
        newest = len(frames) - 1
        return np.stack([frames[max(newest - h, 0)] for h in range(self.sizes["history"])])

    @property
    def _head_size(self) -> int:
        return self.sizes["hidden_size"] // self.sizes["num_heads"]

    @property
    def _kv_names(self) -> list[str]:
        depth = range(self.sizes["depth"])
        return [f"{part}_{block}" for part in ("keys", "values") for block in depth]


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    cos, sin = rope.cos_sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _session(path: Path, threads: int):
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "running an ONNX export needs the package onnxruntime: pip install 'cwm_jax[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
