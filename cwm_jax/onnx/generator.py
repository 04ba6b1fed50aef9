"""The generator's graphs: a denoising step, a whole frame of S steps, and the keys of clean frames.

`cwm_jax.sampling.sampler` computes the same with JAX. Each graph is made of the same layers
(`cwm_jax.onnx.network`); modulations by noise level and action are tabulated, as there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx

from cwm_jax.diffusion import schedule, stillness
from cwm_jax.models.config import DiTConfig
from cwm_jax.onnx import network as layers
from cwm_jax.onnx.network import Lanes, Network
from cwm_jax.onnx.nodes import Nodes, Weights
from cwm_jax.onnx.prediction import Prediction
from cwm_jax.sampling.sampler import NOISE_CLIP, Tables, ddim_levels

MODULATIONS = "modulations"  # [levels · (A + 1), …]; the last level is that of clean frames


class Plan(NamedTuple):
    """The denoising steps of the graphs."""

    steps: tuple[int, ...]  # the numbers S of steps that a frame may be generated with
    context_level: int  # noise level of clean frames

    @property
    def levels(self) -> tuple[int, ...]:
        """All noise levels, falling, then that of clean frames."""
        used = {level for steps in self.steps for level in ddim_levels(steps)}
        return (*sorted(used, reverse=True), self.context_level)

    @property
    def table(self) -> list[tuple[int, float, float]]:
        """Of all denoising steps, S by S: the level's number, ᾱ there, and ᾱ after the step."""
        alpha_bars, rows = schedule.alpha_bars(), []
        for steps in self.steps:
            levels = ddim_levels(steps)
            after = [*(alpha_bars[level] for level in levels[1:]), np.float32(1)]
            for level, later in zip(levels, after, strict=True):
                rows.append((self.levels.index(level), float(alpha_bars[level]), float(later)))
        return rows

    def first_row(self, steps: int) -> int:
        """Index in `table` of the first step of S = `steps`."""
        return sum(self.steps[: self.steps.index(steps)])


def store(
    weights: Weights, config: DiTConfig, params: dict[str, np.ndarray], tables: Tables
) -> None:
    """Stores all weights of a network: its layers' parameters, rotary tables and modulations."""
    layers.store(weights, params)
    layers.store_rotations(weights, config)
    every = (np.concatenate([x, y[None]]) for x, y in zip(tables.steps, tables.context))  # noqa: B905
    rows = [np.asarray(x).reshape(*x.shape[:2], -1) for x in every]
    rows = np.concatenate(rows, axis=-1)
    # Always float32: parameters often are bfloat16 values, exact in float16; tables are not.
    weights.add(MODULATIONS, rows.reshape(-1, rows.shape[-1]), exact=True)


class Graphs:
    """Builds the graphs of one network, whose parameters are stored in `weights`.

    The graphs have these inputs, of T lanes after P frames of the past:

        sample    float32 [T, H, W, 3]: noise, or the result of the previous denoising step
        frames    float32 [T, H, W, 3]: clean frames in [-1, 1]
        earlier   float32 [T, history, H, W, 3], the frames before each lane, newest first; only
                  for networks with history
        action    int32 [T], the action that leads into each lane; −1 for none
        place     int32 [T], the lane's place in time within the window, from 0
        attends   float32 [T, P + T], 1 where a lane attends to a frame of the past or to a lane
        keys_0, values_0, …  float32 [P, S, N, K] of the past for each block, as `encode` returns
                  them; P ≥ 1 (without a past, one that no lane attends to)
        row       int32 [], row of the table of denoising steps
    """

    def __init__(self, config: DiTConfig, weights: Weights, plan: Plan, notes: dict[str, str]):
        self._config, self._weights, self._plan, self._notes = config, weights, plan, notes

    def denoise(self) -> onnx.ModelProto:
        """One denoising step: `sample` after it, and the clean frame if it was the last."""
        nodes = Nodes(self._weights)
        levels, alpha_bars, after = zip(*self._plan.table, strict=True)
        pick = lambda column: nodes("Gather", column, "row", axis=0)
        level = pick(np.array(levels, np.int32))
        pair = [pick(np.array(column, np.float32)) for column in (alpha_bars, after)]
        sample = self._step(nodes, "sample", level, *pair)
        return self._model(nodes, "denoise", ["sample", "row"], self._both(nodes, sample))

    def frame(self, steps: int) -> onnx.ModelProto:
        """All `steps` denoising steps of a frame, from noise."""
        nodes, table = Nodes(self._weights), self._plan.table
        sample = nodes("Clip", "sample", np.float32(-NOISE_CLIP), np.float32(NOISE_CLIP))
        first = self._plan.first_row(steps)
        for level, *pair in table[first : first + steps]:
            sample = self._step(nodes, sample, np.int32(level), *map(np.float32, pair))
        return self._model(nodes, f"frame-{steps}", ["sample"], self._both(nodes, sample))

    def encode(self) -> onnx.ModelProto:
        """Keys and values of clean frames: new_keys_0, new_values_0, …, float32 [T, S, N, K]."""
        nodes, config = Nodes(self._weights), self._config
        context = np.int32(len(self._plan.levels) - 1)
        net = Network(nodes, config, self._lanes, self._modulation(nodes, context))
        sample = "frames"
        if config.history:
            residual = nodes("Sub", "frames", self._last(nodes))
            sample = nodes("Div", residual, np.float32(config.residual_scale))
        _, kv = net.blocks(net.tokens(sample, self._earlier), kv_alone=True)
        shape = ("T", config.tokens, config.num_heads, config.head_size)
        names = [f"new_{name}" for name in self._kv_names]
        outputs = {n: (o, shape) for n, o in zip(names, kv.keys + kv.values, strict=True)}
        return self._model(nodes, "encode", ["frames"], outputs)

    @property
    def _kv_names(self) -> list[str]:
        depth = range(self._config.depth)
        return [f"{part}_{block}" for part in ("keys", "values") for block in depth]

    @property
    def _lanes(self) -> Lanes:
        names, depth = self._kv_names, self._config.depth
        return Lanes("place", "attends", names[:depth], names[depth:])

    @property
    def _earlier(self) -> str | None:
        return "earlier" if self._config.history else None

    def _last(self, nodes: Nodes) -> str:
        """The previous frame of each lane, [T, H, W, 3]."""
        size = self._config.image_size
        return nodes.reshape(nodes.slice("earlier", 1, 0, 1), -1, size, size, 3)

    def _modulation(self, nodes: Nodes, level) -> str:
        """The row of each lane for a noise level, by its number in `Plan.levels`."""
        actions = self._config.action_values + 1
        column = nodes("Mod", nodes.add("action", np.int32(actions)), np.int32(actions))
        row = nodes.add(nodes.mul(level, np.int32(actions)), column)
        return nodes("Gather", nodes.parameter(MODULATIONS), row, axis=0)

    def _step(self, nodes: Nodes, sample: str, level, alpha_bar, after) -> str:
        """The sample after one denoising step."""
        net = Network(nodes, self._config, self._lanes, self._modulation(nodes, level))
        x, _ = net.blocks(net.tokens(sample, self._earlier), kv_alone=False)
        last = self._last(nodes) if self._config.history else None
        prediction = Prediction(nodes, self._config, net, net.outputs(x))
        patches = net.patches(sample)
        velocity = prediction.velocity(patches, last, alpha_bar)
        root = lambda number: nodes("Sqrt", number)
        rest = lambda number: nodes("Sub", np.float32(1), number)
        clean = nodes(
            "Sub",
            nodes.mul(patches, root(alpha_bar)),
            nodes.mul(velocity, root(rest(alpha_bar))),
        )
        inverse = nodes("Reciprocal", alpha_bar)
        noise = nodes("Sub", nodes.mul(patches, root(inverse)), clean)
        noise = nodes("Div", noise, root(nodes("Sub", inverse, np.float32(1))))
        later = nodes.add(nodes.mul(clean, root(after)), nodes.mul(noise, root(rest(after))))
        return net.pixels(later)

    def _both(self, nodes: Nodes, sample: str) -> dict[str, tuple[str, tuple]]:
        config = self._config
        frame = sample
        if config.history:
            residual = nodes.mul(sample, np.float32(config.residual_scale))
            frame = nodes.add(self._last(nodes), residual)
            frame = nodes("Clip", frame, np.float32(-1), np.float32(1))
        if config.still_threshold:
            frame = self._kept(nodes, frame, self._last(nodes))
        shape = ("T", config.image_size, config.image_size, 3)
        return {"denoised": (sample, shape), "frame": (frame, shape)}

    def _kept(self, nodes: Nodes, frame: str, last: str) -> str:
        """The frame with what stands still as in the last one; see `stillness.kept`."""
        size, patch = self._config.image_size, stillness.PATCH
        patches = lambda x: nodes.reshape(x, -1, size // patch, patch, size // patch, patch, 3)
        over = lambda op, x, *axes: nodes(op, x, np.array(axes), keepdims=1)
        frame, last = patches(frame), patches(last)
        change = nodes("Sub", frame, last)
        largest = np.float32((self._config.still_threshold / 127.5) ** 2)
        is_small = nodes("Less", over("ReduceMean", nodes.mul(change, change), 2, 4, 5), largest)
        count = over("ReduceSum", nodes("Cast", is_small, to=onnx.TensorProto.FLOAT), 1, 3)
        enough = np.float32(stillness.SHARE * (size // patch) ** 2)
        is_still = nodes("GreaterOrEqual", count, enough)
        stays = nodes("And", is_small, is_still)
        return nodes.reshape(nodes("Where", stays, last, frame), -1, size, size, 3)

    def _model(self, nodes: Nodes, name: str, own: Sequence[str], outputs) -> onnx.ModelProto:
        config = self._config
        size = config.image_size
        kv = ("P", config.tokens, config.num_heads, config.head_size)
        every = {
            "sample": (np.float32, ("T", size, size, 3)),
            "frames": (np.float32, ("T", size, size, 3)),
            "row": (np.int32, ()),
            "earlier": (np.float32, ("T", config.history, size, size, 3)),
            "action": (np.int32, ("T",)),
            "place": (np.int32, ("T",)),
            "attends": (np.float32, ("T", "P+T")),
            **dict.fromkeys(self._kv_names, (np.float32, kv)),
        }
        shared = ["action", "place", "attends", *self._kv_names]
        taken = [*own, *(["earlier"] if config.history else []), *shared]
        return nodes.model(name, {key: every[key] for key in taken}, outputs, self._notes)
