"""LPIPS: how different two pictures look, by the features of AlexNet.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
https://arxiv.org/abs/1801.03924, version 0.1 of its authors' package `lpips`, `net="alex"`.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cwm_jax.coinrun import to_model
from cwm_jax.errors import UserError

# Of each convolution: kernel size, stride, padding, channels in and out. A 3 × 3 max-pool of
# stride 2 stands before the second and the third.
_CONVS = (
    (11, 4, 2, 3, 64),
    (5, 1, 2, 64, 192),
    (3, 1, 1, 192, 384),
    (3, 1, 1, 384, 256),
    (3, 1, 1, 256, 256),
)
_POOLED = (1, 2)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [−1, 1]
_EPSILON = 1e-10
MIN_SIDE = 31  # pixels: less leaves nothing after the second pool
_PAIRS = 64  # compared in one call of the device


class AlexNetDistance(nnx.Module):
    """The convolutions of AlexNet and, for each, the weights of its channels."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convs = nnx.List(
            nnx.Conv(
                channels,
                features,
                (size, size),
                strides=stride,
                padding=padding,
                precision=jax.lax.Precision.HIGHEST,
                rngs=rngs,
            )
            for size, stride, padding, channels, features in _CONVS
        )
        self.heads = nnx.List(nnx.Param(jnp.ones(features)) for *_, features in _CONVS)

    def features(self, x_BHWC: jax.Array) -> list[jax.Array]:
        """What each convolution sees after its ReLU, at unit length over channels."""
        x, found = (x_BHWC - jnp.array(_SHIFT)) / jnp.array(_SCALE), []
        for i, conv in enumerate(self.convs):
            if i in _POOLED:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = jax.nn.relu(conv(x))
            length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
            found.append(x / (length + _EPSILON))
        return found

    def vectors(self, x_BHWC: jax.Array) -> list[jax.Array]:
        """Of each convolution the vectors [B, h, w, C], so scaled that LPIPS is the sum of their
        squared distances over all places and convolutions.
        """
        pairs = zip(self.features(x_BHWC), self.heads, strict=True)
        return [x * jnp.sqrt(head[...] / (x.shape[1] * x.shape[2])) for x, head in pairs]

    def __call__(self, a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
        """The distance of each pair, [B]; pixels in [−1, 1]."""
        pairs = zip(self.features(a_BHWC), self.features(b_BHWC), self.heads, strict=True)
        # A product and a sum, not a matmul: those are inexact on GPUs unless told otherwise.
        layers = [(jnp.square(a - b) * head[...]).sum(-1).mean((1, 2)) for a, b, head in pairs]
        return sum(layers)


class Lpips(NamedTuple):
    """The network with its weights."""

    params: nnx.State
    source: str  # SHA-256 of what the weights were read from


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, `convs.0.kernel` [H, W, in, out] to `heads.4` [channels]."""
    return {_key(path): leaf.shape for path, leaf in nnx.to_flat_state(_skeleton()[1])}


def from_arrays(arrays: Mapping[str, np.ndarray], source: str = "") -> Lpips:
    """The network with the weights of these names and shapes (`shapes`), float32."""
    flat = nnx.to_flat_state(_skeleton()[1])
    leaves = [(path, leaf.replace(jnp.asarray(arrays[_key(path)]))) for path, leaf in flat]
    return Lpips(nnx.from_flat_state(leaves), source)


@functools.lru_cache
def _skeleton() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: AlexNetDistance(rngs=nnx.Rngs(0))))


def _key(path: tuple) -> str:
    return ".".join(map(str, path))


def distances(lpips: Lpips, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """LPIPS of each pair of pictures: 0 for identical ones, larger for less alike.

    Args:
        a, b: [..., H, W, 3], uint8, or float in [−1, 1].

    Returns:
        float32 [...].

    Raises:
        UserError: pictures that are too small, of other shapes, or not finite.
    """
    _check(a, b)
    lead = a.shape[:-3]
    total = math.prod(lead)
    size, found = min(_PAIRS, total), [np.zeros(0, np.float32)]
    for first in range(0, total, max(size, 1)):
        rows = np.unravel_index(np.minimum(np.arange(first, first + size), total - 1), lead)
        found.append(jax.device_get(_distance(lpips.params, a[rows], b[rows])))
    return np.concatenate(found)[:total].reshape(lead)


@jax.jit
def _distance(params: nnx.State, a_BHWC, b_BHWC) -> jax.Array:
    same_B = (a_BHWC == b_BHWC).all((1, 2, 3))
    a, b = (to_model(x) if x.dtype == jnp.uint8 else x for x in (a_BHWC, b_BHWC))
    return jnp.where(same_B, 0.0, nnx.merge(_skeleton()[0], params)(a, b))


def vectors(lpips: Lpips, frames_NHWC: np.ndarray) -> list[np.ndarray]:
    """`AlexNetDistance.vectors` of pictures, uint8 or float in [−1, 1]: float32 [N, h, w, C] each.

    Raises:
        UserError: pictures that are too small, not RGB, or not finite.
    """
    _check(frames_NHWC, frames_NHWC)
    total = len(frames_NHWC)
    size, parts = min(_PAIRS, total), []
    for first in range(0, total, max(size, 1)):
        rows = np.minimum(np.arange(first, first + size), total - 1)
        parts.append(jax.device_get(_vectors(lpips.params, frames_NHWC[rows])))
    return [np.concatenate(layer)[:total] for layer in zip(*parts, strict=True)]


@jax.jit
def _vectors(params: nnx.State, x_BHWC) -> list[jax.Array]:
    x = to_model(x_BHWC) if x_BHWC.dtype == jnp.uint8 else x_BHWC
    return nnx.merge(_skeleton()[0], params).vectors(x)


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.shape[-1] != 3:
        raise UserError(f"LPIPS compares RGB pictures of one size, not {a.shape} with {b.shape}")
    if min(a.shape[-3:-1]) < MIN_SIDE:
        height, width = a.shape[-3:-1]
        raise UserError(
            f"pictures of {height}×{width} pixels are too small for LPIPS: AlexNet needs "
            f"{MIN_SIDE}×{MIN_SIDE} or more"
        )
    for x in (a, b):
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            place = tuple(np.argwhere(~np.isfinite(x).all((-3, -2, -1)))[0].tolist())
            raise UserError(f"LPIPS: picture {place} is not finite (NaN or infinity)")
