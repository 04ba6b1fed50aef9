"""The network as ONNX nodes: what `cwm_jax.models.dit` computes, for new frames after a past.

A graph takes T new frames ("lanes") and P frames of the past. Which lane attends to which frame is
an argument, so that one graph serves one frame after its past, a clip (each frame attends to those
before it), and frames of several worlds at once.

The keys and values of the past are separate inputs for each block, and are not copied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cwm_jax.models import rope
from cwm_jax.models.config import DiTConfig
from cwm_jax.onnx.nodes import Nodes, Weights

_SPLIT = 6  # outputs of a Split: WebGPU guarantees a shader 8 buffers, inputs and outputs together
_EPSILON = 1e-6  # of norms, as in `cwm_jax.models`
_HIDDEN = -1e9  # added to the scores of frames that a lane does not attend to


class Lanes(NamedTuple):
    """Names of the graph inputs that determine what the new frames attend to."""

    place: str  # int32 [T], place in time of each lane, 0 … max_frames − 1
    attends: str  # float32 [T, P + T], 1 where lane t attends to that frame (past, then lanes)
    keys: list[str]  # of each block, float32 [P, S, N, K], rotated and scaled
    values: list[str]  # of each block, float32 [P, S, N, K]


class NewKV(NamedTuple):
    """Rotated keys and values of the lanes, a pair for each block, [T, S, N, K]."""

    keys: list[str]
    values: list[str]


def store(weights: Weights, params: dict[str, np.ndarray]) -> None:
    """Stores the parameters of all layers except those that `Tables` replace; q | k | v columns."""
    tabulated = ("modulation.", "time_in.", "time_out.", "action.")
    outs = ("patch_out.", "doubt_out.", "motion_out.", "displacement_out.")
    for name, value in params.items():
        if not any(part in name for part in tabulated) and not name.startswith(outs):
            weights.add(name, value)
    for part, axis in (("kernel", 1), ("bias", 0)):  # one product for all outputs
        every = [params[out + part] for out in outs if out + part in params]
        weights.add(f"outputs.{part}", np.concatenate(every, axis=axis))


def store_rotations(weights: Weights, config: DiTConfig) -> None:
    """Stores the rotary tables: `rotation.space.cos` [S, K], `rotation.time.cos` [max_frames, K],
    and as many sines, which have the sign of their half.

    All are scaled by K^(-1/4), so that the scores of attention are scaled by K^(-1/2).
    """
    angles = {
        "space": rope.spatial_angles(config.grid, config.head_size),
        "time": rope.temporal_angles(np.arange(config.max_frames), config.head_size),
    }
    scale = np.float32(config.head_size**-0.25)
    for axis, of_half in angles.items():
        cos, sin = rope.cos_sin(of_half)
        for name, halves in (("cos", (cos, cos)), ("sin", (-sin, sin))):
            table = scale * np.concatenate(halves, axis=-1)
            weights.add(f"rotation.{axis}.{name}", table, exact=True)


class Network:
    """Adds the network's layers to a graph.

    Args:
        nodes: of the graph.
        config: the network's sizes.
        lanes: what the new frames attend to; the graph's inputs.
        modulation: float32 [T, 2 · L · 6 · D + 2 · D], the row of each lane, see `Tables`.
    """

    def __init__(self, nodes: Nodes, config: DiTConfig, lanes: Lanes, modulation: str):
        self._nodes, self._config, self._lanes = nodes, config, lanes
        self._vectors = self._split(modulation)
        frames = nodes("Shape", lanes.keys[0], start=0, end=1), nodes("Shape", lanes.place)
        self._lengths = nodes("Concat", *frames, axis=0)  # P and T
        hidden = nodes("Sub", lanes.attends, np.float32(1))
        self._hidden = nodes.mul(hidden, np.float32(-_HIDDEN))
        turns = [nodes("Gather", table, lanes.place, axis=0) for table in self._rotation("time")]
        self._turns = [nodes.reshape(turn, -1, 1, 1, config.head_size) for turn in turns]

    def tokens(self, sample: str, earlier: str | None) -> str:
        """Samples [T, H, W, 3] and the frames before each, [T, history, H, W, 3], to tokens."""
        nodes, config = self._nodes, self._config
        tokens = self._linear(self.patches(sample), "patch_in")
        if earlier is None:
            return tokens
        grid, size, history = config.grid, config.patch_size, config.history
        split = nodes.reshape(earlier, -1, history, grid, size, grid, size, 3)
        rows = nodes.transpose(split, 0, 2, 4, 3, 5, 1, 6)
        rows = nodes.reshape(rows, -1, config.tokens, size * size * history * 3)
        return nodes.add(tokens, nodes("MatMul", rows, nodes.parameter("history_in.kernel")))

    def patches(self, frames: str) -> str:
        """[T, H, W, 3] to patches in the order row, column, channel: [T, S, P · P · 3]."""
        nodes, grid, size = self._nodes, self._config.grid, self._config.patch_size
        split = nodes.reshape(frames, -1, grid, size, grid, size, 3)
        return nodes.reshape(
            nodes.transpose(split, 0, 1, 3, 2, 4, 5), -1, grid * grid, size * size * 3
        )

    def pixels(self, patches: str) -> str:
        """Undoes `patches`."""
        nodes, grid, size = self._nodes, self._config.grid, self._config.patch_size
        split = nodes.reshape(patches, -1, grid, grid, size, size, 3)
        side = self._config.image_size
        return nodes.reshape(nodes.transpose(split, 0, 1, 3, 2, 4, 5), -1, side, side, 3)

    def blocks(self, x: str, *, kv_alone: bool) -> tuple[str, NewKV]:
        """All blocks; x [T, S, D] to the stream after the last, and the lanes' keys and values.

        Args:
            kv_alone: omits nodes that no key or value depends on; the stream is then unusable.
        """
        kv, depth = NewKV([], []), self._config.depth
        for block in range(depth):
            x = self._spatial(x, block)
            x = self._temporal(x, block, kv, stops=kv_alone and block == depth - 1)
        return x, kv

    def outputs(self, x: str) -> str:
        """All outputs for each token, concatenated, [T, S, …]."""
        return self._linear(self._norm(x, *self._vectors[-2:]), "outputs")

    def _split(self, modulation: str) -> list[str]:
        """The vectors of the modulation, each [T, 1, D], with 1 added to the scales."""
        nodes, size, depth = self._nodes, self._config.hidden_size, self._config.depth
        count = 12 * depth + 2
        is_scale = np.array([*[0, 1, 0, 0, 1, 0] * (2 * depth), 0, 1], np.float32)
        every = nodes.add(nodes.reshape(modulation, -1, count, size), is_scale[:, None])
        vectors = []
        for start in range(0, count, _SPLIT):
            few = min(_SPLIT, count - start)
            some = nodes.slice(every, 1, start, start + few)
            vectors += nodes.several("Split", few, some, np.ones(few, np.int64), axis=1)
        return vectors

    def _of(self, layer: int) -> list[str]:
        """Shift, scale and gate of attention, then of the MLP."""
        return self._vectors[6 * layer : 6 * layer + 6]

    def _norm(self, x: str, shift: str, scale: str) -> str:
        return self._nodes("LayerNormalization", x, scale, shift, axis=-1, epsilon=_EPSILON)

    def _linear(self, x: str, name: str) -> str:
        kernel, bias = (self._nodes.parameter(f"{name}.{part}") for part in ("kernel", "bias"))
        return self._nodes.add(self._nodes("MatMul", x, kernel), bias)

    def _gated(self, x: str, update: str, gate: str) -> str:
        return self._nodes.add(x, self._nodes.mul(update, gate))

    def _spatial(self, x: str, block: int) -> str:
        layer = f"blocks.{block}.spatial"
        shape = self._config.tokens, 1, self._config.head_size
        turns = [self._nodes.reshape(table, *shape) for table in self._rotation("space")]
        q, k, v = self._project(x, layer, 2 * block, turns)
        return self._finish(x, self._over_space(q, k, v), layer, 2 * block)

    def _temporal(self, x: str, block: int, kv: NewKV, *, stops: bool) -> str:
        layer = f"blocks.{block}.temporal"
        q, k, v = self._project(x, layer, 2 * block + 1, self._turns)
        kv.keys.append(k)
        kv.values.append(v)
        if stops:
            return x
        return self._finish(x, self._over_time(q, kv, block), layer, 2 * block + 1)

    def _project(self, x: str, layer: str, number: int, turns: Sequence) -> list[str]:
        """Queries and keys, both rotated and scaled, and values of the normed tokens, [T, S, N, K].

        Queries and keys share the same nodes: fewer, larger nodes cost less.
        """
        nodes, config = self._nodes, self._config
        kernel = nodes.parameter(f"{layer}.qkv.kernel")
        qkv = nodes("MatMul", self._norm(x, *self._of(number)[:2]), kernel)
        sizes = np.array([2 * config.hidden_size, config.hidden_size], np.int64)
        qk, v = nodes.several("Split", 2, qkv, sizes, axis=-1)
        heads = config.num_heads
        qk = nodes.reshape(qk, -1, config.tokens, 2 * heads, config.head_size)
        qk = self._turned(self._unit_rms(qk) if config.qk_norm else qk, *turns)
        q, k = nodes.several("Split", 2, qk, np.array([heads, heads], np.int64), axis=2)
        return [q, k, nodes.reshape(v, -1, config.tokens, heads, config.head_size)]

    def _unit_rms(self, x: str) -> str:
        nodes = self._nodes
        mean = nodes("ReduceMean", nodes.mul(x, x), np.array([-1], np.int64))
        return nodes("Div", x, nodes("Sqrt", nodes.add(mean, np.float32(_EPSILON))))

    def _turned(self, x: str, cos: str | np.ndarray, sin: str | np.ndarray) -> str:
        """x [T, S, …, K] rotated; `sin` has the sign of its half."""
        nodes, half = self._nodes, self._config.head_size // 2
        first, second = nodes.several("Split", 2, x, np.array([half, half], np.int64), axis=-1)
        swapped = nodes("Concat", second, first, axis=-1)
        return nodes.add(nodes.mul(x, cos), nodes.mul(swapped, sin))

    def _rotation(self, axis: str) -> list[str]:
        """Cosines and sines, see `store_rotations`."""
        return [self._nodes.parameter(f"rotation.{axis}.{part}") for part in ("cos", "sin")]

    def _over_space(self, q: str, k: str, v: str) -> str:
        nodes = self._nodes
        q = nodes.transpose(q, 0, 2, 1, 3)
        scores = nodes("MatMul", q, nodes.transpose(k, 0, 2, 3, 1))
        weights = nodes("Softmax", scores, axis=-1)
        attended = nodes("MatMul", weights, nodes.transpose(v, 0, 2, 1, 3))
        return self._joined(nodes.transpose(attended, 0, 2, 1, 3))

    def _joined(self, heads: str) -> str:
        config = self._config
        return self._nodes.reshape(heads, -1, config.tokens, config.hidden_size)

    def _over_time(self, q: str, kv: NewKV, block: int) -> str:
        """Lanes attend to the past and to lanes, separately for each token place."""
        nodes, config = self._nodes, self._config
        heads = config.tokens * config.num_heads
        fold = lambda x: nodes.reshape(x, -1, heads, config.head_size)
        q = nodes.transpose(fold(q), 1, 0, 2)
        keys = [fold(x[block]) for x in (self._lanes.keys, kv.keys)]
        values = [fold(x[block]) for x in (self._lanes.values, kv.values)]
        scores = [nodes("MatMul", q, nodes.transpose(k, 1, 2, 0)) for k in keys]
        scores = nodes.add(nodes("Concat", *scores, axis=-1), self._hidden)  # [S · N, T, P + T]
        weights = nodes("Softmax", scores, axis=-1)
        parts = nodes.several("Split", 2, weights, self._lengths, axis=-1)
        found = [
            nodes("MatMul", part, nodes.transpose(v, 1, 0, 2))
            for part, v in zip(parts, values, strict=True)
        ]
        return self._joined(nodes.transpose(nodes.add(*found), 1, 0, 2))

    def _finish(self, x: str, attended: str, layer: str, number: int) -> str:
        _, _, gate, shift, scale, mlp_gate = self._of(number)
        x = self._gated(x, self._linear(attended, f"{layer}.out"), gate)
        hidden = self._linear(self._norm(x, shift, scale), f"{layer}.mlp_in")
        hidden = self._nodes("Gelu", hidden, approximate="tanh")
        return self._gated(x, self._linear(hidden, f"{layer}.mlp_out"), mlp_gate)
