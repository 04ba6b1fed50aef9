"""The network: a diffusion transformer whose blocks attend over space, then over time.

Architecture: DiT with adaLN-zero (Peebles & Xie 2022, https://arxiv.org/abs/2212.09748), made
spatio-temporal as in Latte (https://arxiv.org/abs/2401.03048), with a noise level for every frame
as in Diffusion Forcing (Chen et al. 2024, https://arxiv.org/abs/2407.01392).

It is split as sampling needs it. A frame's noise level and action act on its tokens only through
`Modulations`, which can be tabulated. Frames interact only through temporal attention, so later
frames depend on a frame only through its temporal keys and values (`FrameKV`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cwm_jax.errors import UserError
from cwm_jax.models import attention, heads, rope
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.heads import Outcomes
from cwm_jax.models.layers import (
    Update,
    add,
    add_and_norm,
    gelu_product,
    linear,
    product,
    unit_rms,
    zeros_linear,
)
from cwm_jax.runtime import random_numbers

Params = dict[str, jax.Array]  # the parameters by name, such as "blocks.0.spatial.qkv.kernel"

SINUSOID = 256  # width of the timestep features
MLP_RATIO = 4
REMAT = ("none", "gelu_norm", "layer")  # what the backward pass recomputes, see `DiT.clip`


class Modulations(NamedTuple):
    """Conditioning of a frame's tokens on its noise level and action."""

    layers: jax.Array  # [..., 2 · depth, 6, D]: shift, scale, gate of attention, then of MLP
    final: jax.Array  # [..., 2, D]: shift, scale before the last linear


class Outputs(NamedTuple):
    """Outputs of the last layers, float32; the last three where the network has them.

    `cwm_jax.diffusion.denoiser` defines their meaning.
    """

    residual: jax.Array  # [B, T, S, P · P · C], each patch's pixels
    log_variance: jax.Array | None  # [B, T, S, 1]
    filters: jax.Array | None  # [B, T, S, 2 · taps], logits
    displacements: jax.Array | None  # [B, T, S, patches of a token · K], logits


class FrameKV(NamedTuple):
    """Temporal keys (not yet rotated) and values of frames, one array for each block."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Past(NamedTuple):
    """The context of new frames: M slots of rotated keys and values for each block."""

    kv: FrameKV  # each [B, S, N, M, K]
    visible_BTM: jax.Array  # bool: slots that hold a frame of the window of each new frame
    position_B: jax.Array  # of the first new frame, int32


def _kept(function):
    """In place of `jax.checkpoint`: everything is stored for the backward pass."""
    return function


def sinusoid(t: jax.Array) -> jax.Array:
    """Features of noise levels [...], float32 [..., 256]: cos, then sin, of t · 10⁴^(−i/128)."""
    half = SINUSOID // 2
    # Rounded as in the original: levels reach 999, so one rounding changes an angle by 6e-5 rad.
    exponents = np.float32(-np.log(10_000)) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def action_vectors(config: DiTConfig, action: jax.Array) -> jax.Array:
    """Actions [...] as float32 [..., num_actions]: 1 for each control in use; all 0 for −1."""
    if config.action_encoding == "one_hot":
        return jax.nn.one_hot(action, config.num_actions)
    held = action[..., None] >> jnp.arange(config.num_actions) & 1
    return jnp.where(action[..., None] < 0, 0, held).astype(jnp.float32)


class Stream(NamedTuple):
    """The residual stream between half blocks; the next norm adds the last update to it."""

    x_BTSD: jax.Array
    update: Update | None = None


class AxialLayer(nnx.Module):
    """Half a block: attention along one axis, then an MLP, each with adaLN."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qk_norm = config.qk_norm
        self.norm, self.mlp = config.norm_kernel, config.mlp_kernel
        self.modulation = zeros_linear(config, size, 6 * size, rngs=rngs)
        self.qkv = linear(config, size, 3 * size, use_bias=False, rngs=rngs)
        self.out = linear(config, size, size, rngs=rngs)
        self.mlp_in = linear(config, size, MLP_RATIO * size, rngs=rngs)
        self.mlp_out = linear(config, MLP_RATIO * size, size, rngs=rngs)

    def project(self, stream: Stream, modulation_BT6D, *, cheap=_kept):
        """The stream, and queries, keys and values of its normed tokens, [B, T, S, 3 · D].

        `cheap` wraps functions that cost little to recompute, here and in `finish`.
        """
        shift, scale = modulation_BT6D[:, :, 0], modulation_BT6D[:, :, 1]
        x_BTSD, normed = self._add_and_norm(stream, shift, scale, cheap)
        qkv = self.qkv(normed)
        return x_BTSD, unit_rms(qkv, self.num_heads) if self.qk_norm else qkv

    def finish(self, x_BTSD, attended_BTSD, modulation_BT6D, *, cheap=_kept) -> Stream:
        """Adds the outputs of attention and then of the MLP, each through its gate."""
        gate, shift, scale, mlp_gate = (modulation_BT6D[:, :, i] for i in (2, 3, 4, 5))
        attended = product(self.out, attended_BTSD)
        stream = Stream(x_BTSD, Update(attended, self.out.bias[...], gate))
        x_BTSD, normed = self._add_and_norm(stream, shift, scale, cheap)
        last, hidden = self.mlp_out, product(self.mlp_in, normed)
        bias, matrix = (x[...].astype(last.dtype) for x in (self.mlp_in.bias, last.kernel))
        how = dict(precision=last.precision, kernel=self.mlp, recompute=cheap is not _kept)
        with jax.named_scope("gelu"):
            found = gelu_product(hidden, bias, matrix, **how)
        return Stream(x_BTSD, Update(found, last.bias[...], mlp_gate))

    @jax.named_scope("norm")
    def _add_and_norm(self, stream: Stream, shift, scale, cheap):
        return cheap(functools.partial(add_and_norm, kernel=self.norm))(*stream, shift, scale)


class Block(nnx.Module):
    """Attention over the tokens of a frame, then over the frames at each token position."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.spatial = AxialLayer(config, rngs=rngs)
        self.temporal = AxialLayer(config, rngs=rngs)


class DiT(nnx.Module):
    """From samples, noise levels and actions of a clip to its `Outputs`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = config.hidden_size
        pixels = config.patch_size**2 * 3
        small = nnx.initializers.normal(0.02)
        self.patch_in = linear(config, pixels, size, rngs=rngs)
        if config.history:
            earlier = config.history * pixels
            self.history_in = linear(config, earlier, size, use_bias=False, rngs=rngs)
        self.time_in = linear(config, SINUSOID, size, kernel_init=small, rngs=rngs)
        self.time_out = linear(config, size, size, kernel_init=small, rngs=rngs)
        self.action = linear(config, config.num_actions, size, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.final_modulation = zeros_linear(config, size, 2 * size, rngs=rngs)
        self.patch_out = zeros_linear(config, size, pixels, rngs=rngs)
        if config.warp_reach:
            self.motion_out = zeros_linear(config, size, 2 * config.taps, rngs=rngs)
        if config.reach:
            per_token = (config.patch_size // config.displacement_patch) ** 2
            logits = per_token * config.reach.count
            self.displacement_out = zeros_linear(config, size, logits, rngs=rngs)
        if config.warp_reach or config.reach:
            self.doubt_out = zeros_linear(config, size, 1, rngs=rngs)
        if config.heads:  # the last, so that the other parameters begin as without
            self.heads = heads.Heads(config, rngs=rngs)

    @jax.named_scope("conditioning")
    def modulations(self, t_BT: jax.Array, action_BT: jax.Array) -> Modulations:
        """The modulations of each frame, from noise levels 0…999 and actions (−1: none)."""
        c = self.time_out(jax.nn.silu(self.time_in(sinusoid(t_BT))))
        c = jax.nn.silu(c + self.action(action_vectors(self.config, action_BT)))
        layers = [half.modulation(c) for b in self.blocks for half in (b.spatial, b.temporal)]
        split = lambda x, parts: x.reshape(*x.shape[:-1], parts, -1)
        return Modulations(
            jnp.stack([split(layer, 6) for layer in layers], axis=-3),
            split(self.final_modulation(c), 2),
        )

    @jax.named_scope("patches")
    def tokens(self, sample_BTHWC: jax.Array, earlier_BTHWC: jax.Array | None = None) -> jax.Array:
        """Noisy samples and the frames before each, newest first, to tokens [B, T, S, D]."""
        assert (earlier_BTHWC is None) == (not self.config.history)
        tokens = self.patch_in(self.patches(sample_BTHWC))
        if earlier_BTHWC is None:
            return tokens
        return tokens + self.history_in(self.patches(earlier_BTHWC))

    def patches(self, frames_BTHWC: jax.Array) -> jax.Array:
        """The numbers of each patch in the order row, column, channel: [B, T, S, P · P · C]."""
        frames, grid, size = frames_BTHWC.shape[:2], self.config.grid, self.config.patch_size
        patches = frames_BTHWC.reshape(*frames, grid, size, grid, size, -1).swapaxes(3, 4)
        return patches.reshape(*frames, grid * grid, -1)

    def outputs(self, stream: Stream, modulations: Modulations) -> Outputs:
        """The outputs of the last layers for the stream after the last block."""
        config = self.config
        shift, scale = modulations.final[:, :, 0], modulations.final[:, :, 1]
        with jax.named_scope("norm"):
            _, modulated = add_and_norm(*stream, shift, scale, kernel=config.norm_kernel)
        exact = lambda layer: layer(modulated).astype(jnp.float32)
        return Outputs(
            residual=exact(self.patch_out),
            log_variance=exact(self.doubt_out) if config.warp_reach or config.reach else None,
            filters=exact(self.motion_out) if config.warp_reach else None,
            displacements=exact(self.displacement_out) if config.reach else None,
        )

    @jax.named_scope("patches")
    def pixels(self, patches_BTSX: jax.Array) -> jax.Array:
        """Patches [B, T, S, P · P · C] to frames [B, T, H, W, C]; the inverse of `patches`."""
        frames, grid, size = patches_BTSX.shape[:2], self.config.grid, self.config.patch_size
        rows = patches_BTSX.reshape(*frames, grid, grid, size, size, 3).swapaxes(3, 4)
        return rows.reshape(*frames, grid * size, grid * size, 3)

    def _spatial(self, block: Block, stream: Stream, modulation_BT6D, *, cheap=_kept) -> Stream:
        angles_SK = rope.spatial_angles(self.config.grid, self.config.head_size)
        x_BTSD, qkv = block.spatial.project(stream, modulation_BT6D, cheap=cheap)
        kernel, heads = self.config.attention_kernels[0], self.config.num_heads
        attended = attention.along_space(qkv, angles_SK, num_heads=heads, implementation=kernel)
        return block.spatial.finish(x_BTSD, attended, modulation_BT6D, cheap=cheap)

    def _temporal(self, block: Block, stream: Stream, modulation_BT6D, *, cheap=_kept):
        frames = np.arange(stream.x_BTSD.shape[1])
        angles_TK = rope.temporal_angles(frames, self.config.head_size)
        x_BTSD, qkv = block.temporal.project(stream, modulation_BT6D, cheap=cheap)
        kernel, heads = self.config.attention_kernels[1], self.config.num_heads
        attended = attention.along_time(qkv, angles_TK, num_heads=heads, implementation=kernel)
        _, k, v = attention.split(qkv, heads)
        return block.temporal.finish(x_BTSD, attended, modulation_BT6D, cheap=cheap), k, v

    def clip(
        self, x_BTSD: jax.Array, modulations: Modulations, *, remat: str = "none"
    ) -> tuple[Stream, FrameKV]:
        """All frames of a clip at once, at positions 0 … T−1; also their keys [B, T, S, N, K].

        `remat` is one of `REMAT`, what a backward pass recomputes to save memory: "gelu_norm" the
        norms and GELUs (no matmul), "layer" all but the input of each half block.
        """
        cheap = jax.checkpoint if remat == "gelu_norm" else _kept
        whole = jax.checkpoint if remat == "layer" else _kept
        # A pending update would be a second array to store for each half block.
        added = (lambda x: Stream(add(*x))) if remat == "layer" else _kept
        # One split, whose gradient XLA joins with that of the stack: slices would be added instead.
        layers = [x[:, :, 0] for x in jnp.split(modulations.layers, 2 * len(self.blocks), axis=2)]
        stream, keys, values = Stream(x_BTSD), [], []
        for i, block in enumerate(self.blocks):
            spatial = whole(functools.partial(self._spatial, block, cheap=cheap))
            temporal = whole(functools.partial(self._temporal, block, cheap=cheap))
            stream = spatial(added(stream), layers[2 * i])
            stream, k, v = temporal(added(stream), layers[2 * i + 1])
            keys.append(k)
            values.append(v)
        return stream, FrameKV(tuple(keys), tuple(values))

    def frames(
        self, x_BTSD: jax.Array, modulations: Modulations, past: Past
    ) -> tuple[Stream, FrameKV]:
        """New frames after their cached context.

        Returns:
            The stream of the last new frame alone, and the keys and values of all of them, each
            [B, T, S, N, K].
        """
        place_BT = past.position_B[:, None] + np.arange(x_BTSD.shape[1])
        angles_BT11K = rope.temporal_angles(place_BT, self.config.head_size)[:, :, None, None]
        stream, keys, values = Stream(x_BTSD), [], []
        for i, block in enumerate(self.blocks):
            stream = self._spatial(block, stream, modulations.layers[:, :, 2 * i])
            temporal = modulations.layers[:, :, 2 * i + 1]
            x_BTSD, qkv = block.temporal.project(stream, temporal)
            q, k, v = attention.split(qkv, self.config.num_heads)
            turned = rope.rotate(q, angles_BT11K), rope.rotate(k, angles_BT11K)
            if i == len(self.blocks) - 1:  # of the others only keys and values are needed
                turned = turned[0][:, -1:], turned[1]
                x_BTSD, temporal = x_BTSD[:, -1:], temporal[:, -1:]
            attended = attention.over_past(
                *turned, v, past.kv.keys[i], past.kv.values[i], past.visible_BTM
            )
            stream = block.temporal.finish(x_BTSD, attended.reshape(x_BTSD.shape), temporal)
            keys.append(k)
            values.append(v)
        return stream, FrameKV(tuple(keys), tuple(values))

    def frame_outputs(
        self, sample_B1HWC, modulations: Modulations, past: Past, earlier_B1HWC=None
    ) -> Outputs:
        """The outputs for one frame after its cached context."""
        tokens = self.tokens(sample_B1HWC, earlier_B1HWC)
        return self.outputs(self.frames(tokens, modulations, past)[0], modulations)

    def __call__(
        self, sample_BTHWC, t_BT, action_BT, earlier_BTHWC=None, *, remat: str = "none"
    ) -> Outputs:
        """The outputs for every frame of a clip.

        Args:
            sample_BTHWC: noisy samples (frames in [-1, 1], or residuals); T ≤ `max_frames`.
            t_BT: noise levels, whole numbers 0…999.
            action_BT: the action that led into each frame, −1 for none.
            earlier_BTHWC: the frames before each, newest first; None for a network without history.
            remat: see `clip`.
        """
        return self.outputs_and_stream(sample_BTHWC, t_BT, action_BT, earlier_BTHWC, remat=remat)[0]

    def outputs_and_stream(
        self, sample_BTHWC, t_BT, action_BT, earlier_BTHWC=None, *, remat: str = "none"
    ) -> tuple[Outputs, Stream]:
        """As `__call__`, and the stream, of which `scene` makes what the heads need."""
        modulations = self.modulations(t_BT, action_BT)
        stream, _ = self.clip(self.tokens(sample_BTHWC, earlier_BTHWC), modulations, remat=remat)
        return self.outputs(stream, modulations), stream

    def scene(self, stream: Stream) -> jax.Array:
        """What the heads keep of frames, [B, T, 256]; for networks with `config.heads` alone."""
        return self.heads.scene(add(*stream))

    def outcomes(self, scene_BTH: jax.Array, pressed_BT: jax.Array) -> Outcomes:
        """What actions pressed at frames earn, and whether they end the episode.

        Args:
            scene_BTH: `scene` of the frames.
            pressed_BT: the actions, int32.
        """
        return self.heads(scene_BTH, action_vectors(self.config, pressed_BT))


class _Keys:
    """The keys of fresh parameters that `nnx.Rngs(key)` gives.

    `nnx.Rngs` counts in a traced variable, each change of which searches all operations so far:
    most of the time of tracing `init`.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


@functools.lru_cache
def _skeleton(config: DiTConfig) -> tuple[nnx.GraphDef, dict[str, tuple], dict[str, nnx.Param]]:
    """The network's graph, and each parameter's path and shape by name."""
    abstract = nnx.eval_shape(lambda: DiT(config, rngs=_Keys(random_numbers.key(0))))
    graph, state = nnx.split(abstract, nnx.Param)
    flat = nnx.to_flat_state(state)
    paths = {_name(path): path for path, _ in flat}
    return graph, paths, {_name(path): leaf for path, leaf in flat}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def init(config: DiTConfig, seed: int) -> Params:
    """Fresh float32 parameters: Xavier uniform, zero biases, adaLN and last linear all zero."""
    state = nnx.state(DiT(config, rngs=_Keys(random_numbers.key(seed))), nnx.Param)
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def shapes(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter, without allocating any."""
    _, _, leaves = _skeleton(config)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def bind(config: DiTConfig, params: Params) -> DiT:
    """The network with these parameters; cheap to create inside each jitted function."""
    graph, paths, leaves = _skeleton(config)
    return nnx.merge(
        graph, nnx.from_flat_state([(paths[n], leaves[n].replace(params[n])) for n in paths])
    )


def with_heads(config: DiTConfig, params: Params, seed: int) -> Params:
    """Parameters with the heads that `config` has: fresh where they lack them, or none."""
    rest = {name: p for name, p in params.items() if not name.startswith(heads.PREFIX)}
    if not config.heads:
        return rest
    return rest | {
        name: params.get(name, fresh)
        for name, fresh in init(config, seed).items()
        if name.startswith(heads.PREFIX)
    }


def check_params(config: DiTConfig, params) -> None:
    """Raises a UserError where names or shapes are not those of the network."""
    wanted = shapes(config)
    if odd := sorted(set(wanted) ^ set(params)):
        raise UserError(f"parameters do not fit the network: missing or unknown {odd[:3]}")
    for name, leaf in wanted.items():
        if leaf.shape != params[name].shape:
            raise UserError(f"parameter {name} has shape {params[name].shape}, not {leaf.shape}")


def parameter_count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
