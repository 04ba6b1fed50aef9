"""Bundles: a model as StableHLO programs, parameters, a manifest and an example, without its code.

    manifest.json        sizes, sampler settings, the run's config, a checksum of every file
    params.safetensors   the parameters
    *.stablehlo          `jax.export` programs for CPU and CUDA, for any number of worlds:
                         tabulate, start, draw (generates a frame), append (adds it)
    example.npz          a prompt, actions, and the frames that follow

`jax.export` keeps programs readable for at least six months of later releases of JAX
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cwm_jax import files
from cwm_jax.checkpoints import weights
from cwm_jax.coinrun import to_pixels
from cwm_jax.errors import UserError
from cwm_jax.sampling import prompt

MANIFEST = "manifest.json"
PARAMS = f"params{weights.SUFFIX}"
EXAMPLE = "example.npz"
PROGRAMS = ("tabulate", "start", "draw", "append")
PLATFORMS = ("cpu", "cuda")
FORMAT = 1
# The required fields of a manifest and their types in JSON.
_NEEDED = {"files": dict, "platforms": list, "network": dict, "drawing": dict}
_NEEDED |= {"config": dict, "step": int}
# Annotations of shardings and sizes. Any other custom call could run native code.
_SAFE_CALLS = frozenset(("Sharding", "shape_assertion"))


@dataclasses.dataclass(frozen=True)
class Network:
    """The sizes that a caller needs."""

    image_size: int
    max_frames: int
    num_actions: int
    action_values: int
    action_encoding: str


class Generation(NamedTuple):
    """Sampler settings, fixed at export; see `sampler.SamplerConfig`."""

    levels: tuple[int, ...]
    window: str
    eta: float
    context_level: int


class State(NamedTuple):
    """B worlds in progress; see `kv_cache.World`."""

    frames_BMHWC: jax.Array
    actions_BM: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    first: jax.Array
    count: jax.Array


class Bundle:
    """Generates frames like `sampler.Sampler`, with the same methods.

    Args:
        folder: what `cwm_jax.tools.export` made.

    Raises:
        UserError: a file is missing or damaged, or the bundle does not support this machine's
            platform.
    """

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        try:
            self.network = Network(**self.manifest["network"])
            settings = self.manifest["drawing"]
            self.config = Generation(**settings | {"levels": tuple(settings["levels"])})
        except (TypeError, KeyError) as error:  # an unknown, missing or wrong field
            raise UserError(
                f"{folder / MANIFEST} has no valid network or sampler settings: {error}"
            ) from None
        self._params, _ = weights.read(folder / PARAMS)
        self._tabulate, self._start, self._generate, self._append = (
            jax.jit(_program(folder, name)) for name in PROGRAMS
        )
        self._tables = self._tabulate(self._params)

    def start(self, frames_BPHWC, actions_BP) -> State:
        """B worlds that begin with these P prompt frames, 1 ≤ P ≤ `max_frames`.

        Args and errors as in `sampler.Sampler.start`.
        """
        padded = prompt.padded(self.network, frames_BPHWC, actions_BP)
        return State(**self._start(self._params, self._tables, *padded))

    def generate(self, state: State, action_B, key: jax.Array) -> jax.Array:
        """The next frame, float32 [B, H, W, C], unclamped; does not change the world."""
        (action_B,) = prompt.next_actions(
            self.network, np.asarray(action_B)[:, None], len(state.actions_BM)
        ).T
        data = jax.random.key_data(key)
        return self._generate(self._params, self._tables, state._asdict(), action_B, data)

    def append(self, state: State, action_B, frame_BHWC: jax.Array) -> State:
        """The world with a generated frame and the action that led into it."""
        action_B = np.asarray(action_B).astype(np.int32)
        args = self._params, self._tables, state._asdict(), action_B, frame_BHWC
        return State(**self._append(*args))

    def step(self, state: State, action_B, key: jax.Array) -> tuple[State, jax.Array]:
        """Generates one frame: (the next world, uint8 [B, H, W, C])."""
        frame = self.generate(state, action_B, key)
        return self.append(state, action_B, frame), to_pixels(frame)

    def rollout(self, state: State, actions_BF, key: jax.Array) -> tuple[State, jax.Array]:
        """Generates one frame for each action: (the next world, uint8 frames [B, F, H, W, C])."""
        frames = []
        for action_B in prompt.next_actions(self.network, actions_BF, len(state.actions_BM)).T:
            state, frame = self.step(state, action_B, key)
            frames.append(frame)
        return state, jnp.stack(frames, axis=1)


def is_bundle(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking every file against it.

    Raises:
        UserError: naming the file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a manifest of a bundle: {error}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}; this version reads {FORMAT}")
    for name, kind in _NEEDED.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{path} has no {name!r} of type {kind.__name__}")
    if missing := sorted({PARAMS, *map(_file_of, PROGRAMS)} - set(manifest["files"])):
        raise UserError(f"{path} does not name {missing[0]} among its files")
    for name, wanted in manifest["files"].items():
        if Path(name).name != name:
            raise UserError(f"{path} names {name!r}: a bundle's files must be beside its manifest")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; copy the whole folder")
        if files.sha256(folder / name) != wanted:
            raise UserError(f"{folder / name} is damaged: its checksum is not the manifest's")
    platform = jax.default_backend().replace("gpu", "cuda")
    if platform not in manifest["platforms"]:
        raise UserError(
            f"{folder} runs on {', '.join(manifest['platforms'])}; this machine has {platform}: "
            "set JAX_PLATFORMS=cpu"
        )
    return manifest


def _file_of(program: str) -> str:
    return f"{program}.stablehlo"


def _program(folder: Path, name: str):
    path = folder / _file_of(name)
    try:
        program = jax.export.deserialize(bytearray(path.read_bytes()))
        if foreign := sorted(_called(program) - _SAFE_CALLS):
            raise UserError(f"{path} calls {foreign[0]}, which generating frames does not need")
        return program.call
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path} cannot be run by JAX {jax.__version__}: {error}") from None


def _called(program: jax.export.Exported) -> set[str]:
    """The custom calls of the program."""
    pattern = r'custom_call @"?([^"(\s]+)|call_target_name = "([^"]*)"'
    found = re.findall(pattern, program.mlir_module())
    return {"".join(either) for either in found}
