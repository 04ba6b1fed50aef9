"""The network: a diffusion transformer whose blocks attend over space, then over time.

Architecture: DiT with adaLN-zero (Peebles & Xie 2022, https://arxiv.org/abs/2212.09748), made
spatio-temporal as in Latte (https://arxiv.org/abs/2401.03048), with a noise label for every frame
as in Diffusion Forcing (Chen et al. 2024, https://arxiv.org/abs/2407.01392).

The pieces are cut where sampling needs them. What a frame's noise label and action say reaches
the tokens only through `Modulations`, which can be tabulated; and time is the only way in which
frames touch each other, so a frame's temporal keys and values (`FrameKV`) are all that later
frames need to know of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cwm_jax import attention, diffusion, motion, rope
from cwm_jax.errors import UserError
from cwm_jax.layers import linear, modulated_norm, zeros_linear
from cwm_jax.network import DiTConfig

Params = dict[str, jax.Array]  # the parameters by name, such as "blocks.0.spatial.qkv.kernel"

SINUSOID = 256  # width of the timestep features
MLP_RATIO = 4
REMAT = ("none", "gelu_norm", "layer")  # what the backward pass computes again, see `DiT.clip`


class Modulations(NamedTuple):
    """Everything a frame's noise label and action say to its tokens."""

    layers: jax.Array  # [..., 2 · depth, 6, D]: shift, scale, gate of attention, then of MLP
    final: jax.Array  # [..., 2, D]: shift, scale before the last linear


class FrameKV(NamedTuple):
    """Temporal keys (not yet rotated) and values of frames, one array for each block."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Past(NamedTuple):
    """Frames that a new frame looks back on: M slots of rotated keys and values for each block."""

    kv: FrameKV  # each [B, S, N, M, K]
    visible_BM: jax.Array  # bool: slots that hold a frame of the window
    position_B: jax.Array  # the new frame's own place in time, int32


def _kept(function):
    """Stands where `jax.checkpoint` might: the backward pass finds all that it needs stored."""
    return function


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def sinusoid(t: jax.Array) -> jax.Array:
    """Features of noise labels [...], float32 [..., 256]: cos, then sin, of t · 10⁴^(−i/128)."""
    half = SINUSOID // 2
    # Rounded as in the original: labels reach 999, so one rounding moves an angle by 6e-5 rad.
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


class AxialLayer(nnx.Module):
    """Half a block: attention along one axis, then an MLP, each under its adaLN."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.modulation = zeros_linear(config, size, 6 * size, rngs=rngs)
        self.qkv = linear(config, size, 3 * size, use_bias=False, rngs=rngs)
        self.out = linear(config, size, size, rngs=rngs)
        self.mlp_in = linear(config, size, MLP_RATIO * size, rngs=rngs)
        self.mlp_out = linear(config, MLP_RATIO * size, size, rngs=rngs)

    def project(self, x_BTSD, modulation_BT6D, *, cheap=_kept):
        """Queries, keys and values of the normed, modulated tokens, [B, T, S, 3 · D].

        `cheap` wraps what costs little to compute again, here and in `finish`.
        """
        shift, scale = modulation_BT6D[:, :, 0], modulation_BT6D[:, :, 1]
        return self.qkv(cheap(modulated_norm)(x_BTSD, shift, scale))

    def finish(self, x_BTSD, attended_BTSD, modulation_BT6D, *, cheap=_kept) -> jax.Array:
        """Adds what attention found, then what the MLP makes of it, each through its gate."""
        gate, shift, scale, mlp_gate = (modulation_BT6D[:, :, i, None] for i in (2, 3, 4, 5))
        x = x_BTSD + gate * self.out(attended_BTSD)
        hidden = self.mlp_in(cheap(modulated_norm)(x, shift[:, :, 0], scale[:, :, 0]))
        return x + mlp_gate * self.mlp_out(cheap(_gelu)(hidden))


class Block(nnx.Module):
    """Attention over the tokens of a frame, then over the frames at each token's place."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.spatial = AxialLayer(config, rngs=rngs)
        self.temporal = AxialLayer(config, rngs=rngs)


class DiT(nnx.Module):
    """Predicts the velocity v = √ᾱ ε − √(1−ᾱ) x0 of every frame of a clip."""

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
        if config.motion:
            weights = 2 * motion.taps(config.motion)
            self.motion_out = zeros_linear(config, size, weights, rngs=rngs)
            self.doubt_out = zeros_linear(config, size, 1, rngs=rngs)

    def modulations(self, t_BT: jax.Array, action_BT: jax.Array) -> Modulations:
        """What noise labels 0…999 and actions (−1: none) say to each frame."""
        c = self.time_out(jax.nn.silu(self.time_in(sinusoid(t_BT))))
        c = jax.nn.silu(c + self.action(action_vectors(self.config, action_BT)))
        layers = [half.modulation(c) for b in self.blocks for half in (b.spatial, b.temporal)]
        split = lambda x, parts: x.reshape(*x.shape[:-1], parts, -1)
        return Modulations(
            jnp.stack([split(layer, 6) for layer in layers], axis=-3),
            split(self.final_modulation(c), 2),
        )

    def tokens(self, sample_BTHWC: jax.Array, earlier_BTHWC: jax.Array | None = None) -> jax.Array:
        """Noised samples, and `change.earlier` of their frames, to token vectors [B, T, S, D]."""
        assert (earlier_BTHWC is None) == (not self.config.history)
        tokens = self.patch_in(self._patches(sample_BTHWC))
        if earlier_BTHWC is None:
            return tokens
        return tokens + self.history_in(self._patches(earlier_BTHWC))

    def _patches(self, frames_BTHWC: jax.Array) -> jax.Array:
        """The numbers of each patch in the order row, column, channel: [B, T, S, P · P · C]."""
        frames, grid, size = frames_BTHWC.shape[:2], self.config.grid, self.config.patch_size
        patches = frames_BTHWC.reshape(*frames, grid, size, grid, size, -1).swapaxes(3, 4)
        return patches.reshape(*frames, grid * grid, -1)

    def pixels(
        self,
        x_BTSD: jax.Array,
        modulations: Modulations,
        sample_BTHWC: jax.Array,
        alpha_bar: jax.Array,
        earlier_BTHWC: jax.Array | None = None,
    ) -> jax.Array:
        """Token vectors to a velocity for each pixel, float32 [B, T, H, W, C].

        The noised sample, the share of signal in it (`alpha_bar`, [B, T] or []) and
        `change.earlier` count only with `config.motion`.
        """
        frames, grid, size = x_BTSD.shape[:2], self.config.grid, self.config.patch_size
        shift, scale = modulations.final[:, :, 0], modulations.final[:, :, 1]
        modulated = modulated_norm(x_BTSD, shift, scale)
        patches = self.patch_out(modulated).astype(jnp.float32)
        if self.config.motion:
            last, scores = earlier_BTHWC[..., :3], self.motion_out(modulated)
            moved = motion.change(last, scores, reach=self.config.motion, patch=size)
            moved = moved / self.config.change_scale
            doubt = self.doubt_out(modulated).astype(jnp.float32)
            sample, alpha_bar = self._patches(sample_BTHWC), jnp.asarray(alpha_bar)[..., None, None]
            patches = motion.velocity(sample, moved, doubt, patches, alpha_bar)
        rows = patches.reshape(*frames, grid, grid, size, size, 3).swapaxes(3, 4)
        return rows.reshape(*frames, grid * size, grid * size, 3)

    @property
    def _how(self) -> dict:
        """What attention over clips has to know of the network."""
        return dict(num_heads=self.config.num_heads, implementation=self.config.attention_kernel)

    def _spatial(self, block: Block, x_BTSD, modulation_BT6D, *, cheap=_kept) -> jax.Array:
        angles_SK = rope.spatial_angles(self.config.grid, self.config.head_size)
        qkv = block.spatial.project(x_BTSD, modulation_BT6D, cheap=cheap)
        attended = attention.along_space(qkv, angles_SK, **self._how)
        return block.spatial.finish(x_BTSD, attended, modulation_BT6D, cheap=cheap)

    def _temporal(self, block: Block, x_BTSD, modulation_BT6D, *, cheap=_kept):
        angles_TK = rope.temporal_angles(np.arange(x_BTSD.shape[1]), self.config.head_size)
        qkv = block.temporal.project(x_BTSD, modulation_BT6D, cheap=cheap)
        attended = attention.along_time(qkv, angles_TK, **self._how)
        _, k, v = attention.split(qkv, self.config.num_heads)
        return block.temporal.finish(x_BTSD, attended, modulation_BT6D, cheap=cheap), k, v

    def clip(
        self, x_BTSD: jax.Array, modulations: Modulations, *, remat: str = "none"
    ) -> tuple[jax.Array, FrameKV]:
        """All frames of a clip at once, at places 0 … T−1; also their keys [B, T, S, N, K].

        `remat` is one of `REMAT`, what a backward pass computes again to save memory:
        "gelu_norm" the norms and GELUs (no matmul), "layer" all but the input of each half block.
        """
        cheap = jax.checkpoint if remat == "gelu_norm" else _kept
        whole = jax.checkpoint if remat == "layer" else _kept
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            spatial = whole(functools.partial(self._spatial, block, cheap=cheap))
            temporal = whole(functools.partial(self._temporal, block, cheap=cheap))
            x_BTSD = spatial(x_BTSD, modulations.layers[:, :, 2 * i])
            x_BTSD, k, v = temporal(x_BTSD, modulations.layers[:, :, 2 * i + 1])
            keys.append(k)
            values.append(v)
        return x_BTSD, FrameKV(tuple(keys), tuple(values))

    def frame(self, x_B1SD: jax.Array, modulations: Modulations, past: Past):
        """One frame after a known past; also its own keys and values, each [B, S, N, K]."""
        angles_B11K = rope.temporal_angles(past.position_B, self.config.head_size)[:, None, None]
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x_B1SD = self._spatial(block, x_B1SD, modulations.layers[:, :, 2 * i])
            temporal = modulations.layers[:, :, 2 * i + 1]
            qkv = block.temporal.project(x_B1SD, temporal)
            q, k, v = (part[:, 0] for part in attention.split(qkv, self.config.num_heads))
            turned = rope.rotate(q, angles_B11K), rope.rotate(k, angles_B11K)
            attended = attention.over_past(
                *turned, v, past.kv.keys[i], past.kv.values[i], past.visible_BM
            )
            x_B1SD = block.temporal.finish(x_B1SD, attended.reshape(x_B1SD.shape), temporal)
            keys.append(k)
            values.append(v)
        return x_B1SD, FrameKV(tuple(keys), tuple(values))

    def __call__(
        self, sample_BTHWC, t_BT, action_BT, earlier_BTHWC=None, *, remat: str = "none"
    ) -> jax.Array:
        """Velocity of every frame's sample, float32 [B, T, H, W, C].

        Args:
            sample_BTHWC: noised samples (frames in [-1, 1], or changes), float; T ≤ `max_frames`.
            t_BT: noise labels, whole numbers 0…999.
            action_BT: the action that led into each frame, −1 for none.
            earlier_BTHWC: `change.earlier`, None for a network without history.
            remat: see `clip`.
        """
        modulations = self.modulations(t_BT, action_BT)
        x_BTSD, _ = self.clip(self.tokens(sample_BTHWC, earlier_BTHWC), modulations, remat=remat)
        alpha_bar = jnp.asarray(diffusion.alpha_bars())[t_BT]
        return self.pixels(x_BTSD, modulations, sample_BTHWC, alpha_bar, earlier_BTHWC)


@functools.lru_cache
def _skeleton(config: DiTConfig) -> tuple[nnx.GraphDef, dict[str, tuple], dict[str, nnx.Param]]:
    """The network without its numbers: its graph, and each parameter's path and shape by name."""
    abstract = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract, nnx.Param)
    flat = nnx.to_flat_state(state)
    paths = {_name(path): path for path, _ in flat}
    return graph, paths, {_name(path): leaf for path, leaf in flat}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def init(config: DiTConfig, seed: int) -> Params:
    """Fresh float32 parameters: Xavier uniform, zero biases, adaLN and last linear all zero."""
    state = nnx.state(DiT(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def shapes(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter, without making any."""
    return jax.eval_shape(lambda: init(config, 0))


def bind(config: DiTConfig, params: Params) -> DiT:
    """The network with these parameters; cheap, made anew inside each jitted function."""
    graph, paths, leaves = _skeleton(config)
    return nnx.merge(
        graph, nnx.from_flat_state([(paths[n], leaves[n].replace(params[n])) for n in paths])
    )


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
