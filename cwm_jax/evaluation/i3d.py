"""I3D: what a network that was trained to name actions sees in a short video.

Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?", https://arxiv.org/abs/1705.07750: the
RGB network for the 400 classes of Kinetics. Its 400 logits are the features by which FVD and KVD
compare videos (Unterthiner et al. 2018, https://arxiv.org/abs/1812.01717).
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from cwm_jax.coinrun import to_model
from cwm_jax.errors import UserError

FEATURES = 400
MIN_FRAMES = 9  # fewer leave one frame after the strides, and the last pool needs two
_SIDE = 224  # pixels to which frames are enlarged: the network's own size
# Channels of the six convolutions of each mixed layer: alone, before and after two branches' 3 × 3,
# after the pool.
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
_POOLED = {"4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}  # before these
_STEM = ((3, 64, 7, 2), (64, 64, 1, 1), (64, 192, 3, 1))  # channels in, out, kernel size, stride
_HIGHEST = jax.lax.Precision.HIGHEST


class Unit(nnx.Module):
    """A convolution, a norm by the statistics of training, and a ReLU."""

    def __init__(self, channels: int, features: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels,
            features,
            (size, size, size),
            strides=(stride, stride, stride),
            use_bias=False,
            precision=_HIGHEST,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(
            features, use_running_average=True, use_scale=False, epsilon=1e-3, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(x)))


class Mixed(nnx.Module):
    """An Inception layer: four branches, whose channels stand side by side."""

    def __init__(self, channels: int, features: tuple[int, ...], *, rngs: nnx.Rngs):
        alone, before_1, after_1, before_2, after_2, pooled = features
        sizes = (
            (channels, alone, 1),
            (channels, before_1, 1),
            (before_1, after_1, 3),
            (channels, before_2, 1),
            (before_2, after_2, 3),
            (channels, pooled, 1),
        )
        self.units = nnx.List(Unit(*size, rngs=rngs) for size in sizes)

    def __call__(self, x: jax.Array) -> jax.Array:
        alone, before_1, after_1, before_2, after_2, pooled = self.units
        around = nnx.max_pool(x, (3, 3, 3), strides=(1, 1, 1), padding="SAME")
        branches = alone(x), after_1(before_1(x)), after_2(before_2(x)), pooled(around)
        return jnp.concatenate(branches, axis=-1)


class InceptionI3d(nnx.Module):
    """The network up to its logits."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.List(Unit(*size, rngs=rngs) for size in _STEM)
        self.mixed = nnx.List()
        channels = _STEM[-1][1]
        for features in MIXED.values():
            self.mixed.append(Mixed(channels, features, rngs=rngs))
            channels = sum(features[i] for i in (0, 2, 4, 5))
        self.logits = nnx.Conv(channels, FEATURES, (1, 1, 1), precision=_HIGHEST, rngs=rngs)

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """The logits, means over time, [B, 400]; pixels in [−1, 1], 224 × 224."""
        halved = lambda x: nnx.max_pool(x, (1, 3, 3), strides=(1, 2, 2), padding="SAME")
        first, second, third = self.stem
        x = halved(third(second(halved(first(x_BTHWC)))))
        for name, layer in zip(MIXED, self.mixed, strict=True):
            if name in _POOLED:
                window, strides = _POOLED[name]
                x = nnx.max_pool(x, window, strides=strides, padding="SAME")
            x = layer(x)
        x = nnx.avg_pool(x, (2, 7, 7), strides=(1, 1, 1), padding="VALID")
        return self.logits(x).mean((1, 2, 3))


class I3d(NamedTuple):
    """The network with its weights."""

    params: nnx.State
    source: str  # SHA-256 of what the weights were read from


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, such as `mixed.0.units.2.conv.kernel` [T, H, W, in, out]."""
    return {_key(path): leaf.shape for path, leaf in nnx.to_flat_state(_skeleton()[1])}


def from_arrays(arrays: Mapping[str, np.ndarray], source: str = "") -> I3d:
    """The network with the weights of these names and shapes (`shapes`), float32."""
    flat = nnx.to_flat_state(_skeleton()[1])
    leaves = [(path, leaf.replace(jnp.asarray(arrays[_key(path)]))) for path, leaf in flat]
    return I3d(nnx.from_flat_state(leaves), source)


@functools.lru_cache
def _skeleton() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: InceptionI3d(rngs=nnx.Rngs(0))))


def _key(path: tuple) -> str:
    return ".".join(map(str, path))


def features(i3d: I3d, clips_NTHWC: np.ndarray, *, label: str = "") -> np.ndarray:
    """The features of videos, float32 [N, 400]; one video at a time, which is what fits a laptop.

    Args:
        clips_NTHWC: RGB, uint8, or float in [−1, 1]; of any size, enlarged to 224 × 224 pixels.
        label: shown on a progress bar; none without.

    Raises:
        UserError: too few frames, or frames that are not RGB or not finite.
    """
    check(clips_NTHWC)
    shown = tqdm(clips_NTHWC, desc=label, unit="clip", disable=not label)
    found = [jax.device_get(_features(i3d.params, clip[None]))[0] for clip in shown]
    return np.stack(found) if found else np.zeros((0, FEATURES), np.float32)


def check(clips_NTHWC: np.ndarray) -> None:
    """Raises a UserError for what is no stack of videos that the network can see."""
    if clips_NTHWC.ndim != 5 or clips_NTHWC.shape[-1] != 3:
        raise UserError(f"I3D sees RGB videos [N, T, H, W, 3], not {clips_NTHWC.shape}")
    if clips_NTHWC.shape[1] < MIN_FRAMES:
        raise UserError(
            f"videos of {clips_NTHWC.shape[1]} frames are too short for I3D, which needs "
            f"{MIN_FRAMES} or more"
        )
    if clips_NTHWC.dtype.kind == "f":
        (bad,) = np.nonzero(~np.isfinite(clips_NTHWC).all((1, 2, 3, 4)))
        if len(bad):
            raise UserError(f"I3D: video {bad[0]} is not finite (NaN or infinity)")


@jax.jit
def _features(params: nnx.State, clips_BTHWC) -> jax.Array:
    x = to_model(clips_BTHWC) if clips_BTHWC.dtype == jnp.uint8 else clips_BTHWC
    x = jax.image.resize(x, (*x.shape[:2], _SIDE, _SIDE, x.shape[-1]), "linear")
    return nnx.merge(_skeleton()[0], params)(x)
