"""A network of random weights and pictures to compare, the same on every machine.

Run by itself it asks the authors' package for their distances, and writes `lpips_reference.json`:

    pip install torch lpips && python tests/evaluation/lpips_case.py
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "lpips_reference.json"
_CONVS = ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))


def weights() -> dict[str, np.ndarray]:
    """Random weights by the names of `cwm_jax.evaluation.lpips.shapes`, HWIO."""
    rng = np.random.RandomState(0)  # whose uniform numbers no version of NumPy may change
    found = {}
    for i, (size, channels, features) in enumerate(_CONVS):
        bound = (6 / (size * size * channels)) ** 0.5
        uniform = lambda *shape: rng.random_sample(shape).astype(np.float32)
        found[f"convs.{i}.kernel"] = (2 * uniform(size, size, channels, features) - 1) * bound
        found[f"convs.{i}.bias"] = 0.2 * uniform(features) - 0.1
        found[f"heads.{i}"] = uniform(features) * (uniform(features) < 0.3)
    return {name: array.astype(np.float32) for name, array in found.items()}


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pictures, float32 [12, 64, 64, 3] in [−1, 1]: from near copies to other ones."""
    rng = np.random.RandomState(1)
    blocks = rng.random_sample((12, 8, 8, 3))
    a = np.kron(blocks, np.ones((1, 8, 8, 1))) * 2 - 1
    a = 0.8 * a + 0.2 * (2 * rng.random_sample(a.shape) - 1)
    size = np.array([0.002, 0.02, 0.1, 0.5, 1, 2]).repeat(2).reshape(-1, 1, 1, 1)
    b = a + size * (2 * rng.random_sample(a.shape) - 1)
    b[1::4] = np.roll(a[1::4], 3, axis=2)
    return a.astype(np.float32), b.clip(-1, 1).astype(np.float32)


def of_authors(arrays: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> list[float]:
    """The distances that the authors' package gives with these weights."""
    import torch

    class AlexNet:  # as in torchvision, which is needed for no more than this
        def __init__(self):
            conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
            layers = [conv(3, 64, 11, 4, 2), relu(), pool(3, 2)]
            layers += [conv(64, 192, 5, padding=2), relu(), pool(3, 2)]
            for channels, features in ((192, 384), (384, 256), (256, 256)):
                layers += [conv(channels, features, 3, padding=1), relu()]
            self.features = torch.nn.Sequential(*layers, pool(3, 2))

    stub = types.ModuleType("torchvision")
    stub.models = types.SimpleNamespace(alexnet=lambda **_: AlexNet())
    sys.modules["torchvision"] = stub
    import lpips

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    convs = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d)]
    for i, (conv, head) in enumerate(zip(convs, model.lins, strict=True)):
        kernel = torch.from_numpy(arrays[f"convs.{i}.kernel"].transpose(3, 2, 0, 1).copy())
        conv.weight.data, conv.bias.data = kernel, torch.from_numpy(arrays[f"convs.{i}.bias"])
        head.model[-1].weight.data = torch.from_numpy(arrays[f"heads.{i}"]).reshape(1, -1, 1, 1)
    with torch.no_grad():
        channels_first = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (a, b))
        return model(*channels_first).ravel().tolist()


if __name__ == "__main__":
    found = of_authors(weights(), *pictures())
    REFERENCE.write_text(json.dumps({"lpips 0.1.4, net=alex": found}, indent=1) + "\n")
