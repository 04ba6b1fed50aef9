"""Trials of kernels: the checks that a kernel must pass, and the shapes it is timed on.

A trial belongs to one setting of the network. Its checks use small arrays: random numbers, and
numbers on which kernels are known to fail. Its timings use the shapes of the run.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.models import attention, dit, layers, rope
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.kernels import gelu_product, norm, reference

Function = Callable[..., object]  # of arrays, to an array or several

_CLIPS = 3  # of a check; one for each logsumexp
_LOGSUMEXP = (-150.0, 0.0, 250.0)
# Allowed errors relative to the root mean square, for random and for extreme numbers.
_NEAR = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 5e-2)}


class Check(NamedTuple):
    """A computation whose values and gradients are compared with a float32 formula."""

    name: str
    make: Callable[[str], Function]  # the computation by a candidate's name
    formula: Function
    arrays: tuple[np.ndarray, ...]  # float32; candidates get them in the dtype of the trial
    near: float  # the largest error, relative to the root mean square


class Timing(NamedTuple):
    """A computation that is timed, forward and backward."""

    make: Callable[[str], Function]
    shapes: tuple[tuple[int, ...], ...]  # of its arrays


class Trial(NamedTuple):
    """All checks and timings of the candidates for one setting."""

    setting: str
    candidates: tuple[str, ...]
    dtype: jnp.dtype
    checks: tuple[Check, ...]
    timings: tuple[Timing, ...]


def trials(network: DiTConfig, *, clips: int, frames: int) -> Iterator[Trial]:
    """The trials of the settings that are auto.

    Args:
        clips: that a device processes at once.
        frames: of a clip.
    """
    size = network.head_size
    over_space, over_time = network.attentions
    if over_space == "auto":
        angles = rope.spatial_angles(network.grid, size)
        axis = _Axis("space", attention.along_space, angles, False)
        yield _attention("attention", axis, network.tokens, network, clips, frames)
    if over_time == "auto":
        angles = rope.temporal_angles(np.arange(frames), size)
        axis = _Axis("time", attention.along_time, angles, True)
        yield _attention("time_attention", axis, frames, network, clips, frames)
    if network.norm == "auto":
        yield _norm(network, clips, frames)
    if network.mlp == "auto":
        yield _mlp(network, clips, frames)


class _Axis(NamedTuple):
    """Attention along one axis of a clip."""

    name: str
    along: Function
    angles_LJ: np.ndarray
    causal: bool

    def by(self, name: str, num_heads: int, angles_LJ: np.ndarray) -> Function:
        return lambda qkv: self.along(qkv, angles_LJ, num_heads=num_heads, implementation=name)

    def formula(self, num_heads: int, angles_LJ: np.ndarray) -> Function:
        def attend(qkv_BTSC):
            rows = qkv_BTSC
            if not self.causal:  # each frame is a sequence
                rows = rows.reshape(-1, rows.shape[2], 1, rows.shape[3])
            turn = rope.cos_sin(angles_LJ)
            how = dict(num_heads=num_heads, causal=self.causal)
            out = reference.rotary_attention(rows, *turn, **how)
            return out.reshape(*qkv_BTSC.shape[:3], -1)

        return attend


def _attention(
    setting: str, axis: _Axis, length: int, network: DiTConfig, clips: int, frames: int
) -> Trial:
    dtype, heads, size = network.compute_dtype, network.num_heads, network.head_size
    row = frames, network.tokens, 3 * network.hidden_size
    near, near_extreme = _NEAR[dtype.name]
    turn, still = axis.angles_LJ, np.zeros_like(axis.angles_LJ)
    checks = []
    for name, angles, qkv, most in (
        ("random numbers", turn, _normal(0, _CLIPS, *row), near),
        # Not rotated: rounding after rotation would change scores of 250 by more than 1.
        ("extreme scores", still, _extreme(axis, (_CLIPS, *row), size), near_extreme),
    ):
        make = lambda name, angles=angles: axis.by(name, heads, angles)
        title = f"{name} over {axis.name}"
        checks.append(Check(title, make, axis.formula(heads, angles), (qkv,), most))
    timing = Timing(lambda name: axis.by(name, heads, turn), ((clips, *row),))
    candidates = attention.candidates(dtype, size, length=length)
    return Trial(setting, candidates, dtype, tuple(checks), (timing,))


def _extreme(axis: _Axis, shape: tuple[int, ...], head_size: int) -> np.ndarray:
    """qkv whose rows have a logsumexp near −150, 0 and 250: by place over time, else by clip."""
    clips, _, tokens, _ = shape
    q, k, v = np.split(_normal(1, *shape), 3, axis=-1)
    by_clip = np.resize(_LOGSUMEXP, clips).reshape(clips, 1, 1, 1)
    by_place = np.resize(_LOGSUMEXP, tokens).reshape(1, 1, tokens, 1)
    wanted = by_place if axis.causal else by_clip
    k = 0.3 * k + (wanted / (4 * head_size**0.5)).astype(np.float32)
    return np.concatenate([4 + 0.3 * q, k, v], axis=-1)


def _norm(network: DiTConfig, clips: int, frames: int) -> Trial:
    dtype, size = network.compute_dtype, network.hidden_size

    def shapes(clips: int):
        stream, row = (clips, frames, network.tokens, size), (clips, frames, size)
        return stream, stream, (size,), row, row, row

    def by(name: str) -> Function:
        def add_and_norm(x, product, bias, gate, shift, scale):
            update = layers.Update(product, bias, gate)
            return layers.add_and_norm(x, update, shift, scale, kernel=name)

        return add_and_norm

    near, near_extreme = _NEAR[dtype.name]
    plain = tuple(_normal(i, *shape) for i, shape in enumerate(shapes(_CLIPS)))
    x, product, bias, gate, *rest = plain
    checks = (
        Check("random numbers", by, norm_formula, plain, near),
        Check(
            "a far mean",
            by,
            norm_formula,
            (30 * x + 300, product, bias, gate, *rest),
            near_extreme,
        ),
        Check(
            "no variance",
            by,
            norm_formula,
            (np.full_like(x, 7), product, bias, np.zeros_like(gate), *rest),
            near_extreme,
        ),
    )
    fits = norm.fits(jax.ShapeDtypeStruct(shapes(clips)[0], dtype))
    candidates = ("xla", "triton") if fits else ("xla",)
    return Trial("norm", candidates, dtype, checks, (Timing(by, shapes(clips)),))


def norm_formula(x_BTSD, product_BTSD, bias_D, gate_BTD, shift_BTD, scale_BTD):
    x = x_BTSD + gate_BTD[:, :, None] * (product_BTSD + bias_D)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + norm.EPSILON)
    return x, normed * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]


def _mlp(network: DiTConfig, clips: int, frames: int) -> Trial:
    dtype, size = network.compute_dtype, network.hidden_size
    by = lambda name: functools.partial(layers.gelu_product, kernel=name)
    wide = dit.MLP_RATIO * size
    shapes = lambda clips: ((clips, frames, network.tokens, wide), (wide,), (wide, size))
    near, near_extreme = _NEAR[dtype.name]
    x, bias, matrix = (_normal(i, *shape) for i, shape in enumerate(shapes(_CLIPS)))
    matrix *= np.float32(wide**-0.5)
    checks = (
        Check("random numbers", by, mlp_formula, (x, bias, matrix), near),
        Check("large numbers", by, mlp_formula, (40 * x, bias, matrix), near_extreme),
    )
    of_x, _, of_matrix = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes(clips))
    fits = dtype == jnp.bfloat16 and gelu_product.fits(of_x, of_matrix)
    candidates = ("xla", "triton") if fits else ("xla",)
    return Trial("mlp", candidates, dtype, checks, (Timing(by, shapes(clips)),))


def mlp_formula(x, bias, matrix):
    hidden = jax.nn.gelu(x + bias, approximate=True)
    return jnp.dot(hidden, matrix, precision=jax.lax.Precision.HIGHEST)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
