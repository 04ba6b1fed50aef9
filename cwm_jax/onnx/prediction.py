"""The interpretation of the network's outputs for a noisy sample, as ONNX nodes.

`cwm_jax.diffusion.denoiser`, `warp` and `displacement` compute the same in JAX, here in patches:
rows of P · P · 3 numbers, one for each token.
"""

import numpy as np

from cwm_jax.diffusion import denoiser, displacement, warp
from cwm_jax.models.config import DiTConfig
from cwm_jax.onnx.network import Network
from cwm_jax.onnx.nodes import Nodes


class Prediction:
    """Adds the interpretation of outputs to a graph.

    Args:
        outputs: `Network.outputs`: residual, log-variance, then the logits of filters or of
            displacements, concatenated.
    """

    def __init__(self, nodes: Nodes, config: DiTConfig, net: Network, outputs: str):
        self._nodes, self._config, self._net = nodes, config, net
        pixels = config.patch_size**2 * 3
        part = lambda start, stop: nodes.slice(outputs, 2, start, stop)
        self._residual = part(0, pixels)
        if config.warp_reach or config.reach:
            self._log_variance = part(pixels, pixels + 1)
            self._logits = part(pixels + 1, np.iinfo(np.int32).max)

    def velocity(self, sample: str, last: str | None, alpha_bar) -> str:
        """The velocity of noisy samples in patches; see `Denoiser.velocity`."""
        nodes, one = self._nodes, np.float32(1)
        if self._config.prediction == "clean":
            signal = nodes.mul(sample, nodes("Sqrt", alpha_bar))
            sigma = nodes("Sqrt", nodes("Sub", one, alpha_bar))
            return nodes("Div", nodes("Sub", signal, self._residual), sigma)
        if not (self._config.warp_reach or self._config.reach):
            return self._residual
        guess = self._filtered(last) if self._config.warp_reach else self._displaced(last)
        guess = nodes("Div", guess, np.float32(self._config.residual_scale))
        variance = nodes(
            "Exp", nodes("Clip", self._log_variance, *map(np.float32, warp.LOG_VARIANCES))
        )
        noise = nodes("Sub", one, alpha_bar)
        whole = nodes.add(nodes.mul(variance, alpha_bar), noise)
        sigma = nodes("Sqrt", noise)
        mixed = nodes.mul(nodes("Sub", one, variance), nodes("Sqrt", alpha_bar), sigma)
        known = nodes("Sub", nodes.mul(sample, mixed), nodes.mul(guess, sigma))
        unknown = nodes("Sqrt", nodes("Div", variance, whole))
        return nodes.add(nodes("Div", known, whole), nodes.mul(self._residual, unknown))

    def _displaced(self, last: str) -> str:
        """How each small patch's copy, by its most likely displacement, differs from `last`."""
        nodes, reach = self._nodes, self._config.reach
        side, grid = self._config.patch_size // reach.patch, self._config.grid
        logits = nodes.reshape(self._logits, -1, grid, grid, side, side, reach.count)
        cost = denoiser.STAY * displacement.distances(reach)
        logits = nodes("Sub", nodes.transpose(logits, 0, 1, 3, 2, 4, 5), cost)
        chosen = nodes("Cast", nodes("ArgMax", logits, axis=-1, keepdims=0), to=6)  # int32
        moved = nodes("Sub", self._picked(last, self._places(chosen)), last)
        return self._net.patches(moved)

    def _places(self, chosen: str) -> str:
        """Number of the pixel of the last frame that each pixel comes from, int32 [T, H · W]."""
        nodes, reach, size = self._nodes, self._config.reach, self._config.image_size
        small, columns = reach.patch, np.int32(2 * reach.across + 1)
        blocks = nodes.reshape(chosen, -1, size // small, 1, size // small, 1)
        rows = nodes("Sub", nodes("Div", blocks, columns), np.int32(reach.down))
        across = nodes("Sub", nodes("Mod", blocks, columns), np.int32(reach.across))
        line = np.arange(size, dtype=np.int32).reshape(size // small, small)
        edge = np.int32(0), np.int32(size - 1)
        y = nodes("Clip", nodes.add(rows, line[:, :, None, None]), *edge)
        x = nodes("Clip", nodes.add(across, line[None, None]), *edge)
        return nodes.reshape(nodes.add(nodes.mul(y, np.int32(size)), x), -1, size * size)

    def _picked(self, last: str, places: str) -> str:
        """The pixels of each lane's last frame at these places, [T, H, W, 3]."""
        nodes, size = self._nodes, self._config.image_size
        pixels = nodes.reshape(last, -1, size * size, 3)
        every = nodes("Expand", nodes("Unsqueeze", places, np.array([2])), np.array([1, 1, 3]))
        return nodes.reshape(nodes("GatherElements", pixels, every, axis=1), -1, size, size, 3)

    def _filtered(self, last: str) -> str:
        """How each patch, warped by its two filters, differs from `last`; see `warp.change`."""
        nodes, config = self._nodes, self._config
        reach, patch, size = config.warp_reach, config.patch_size, config.image_size
        wide = patch + 2 * reach
        starts = np.arange(0, size, patch)
        line = np.clip(starts[:, None] + np.arange(-reach, patch + reach), 0, size - 1)
        places = line[:, None, :, None] * size + line[None, :, None, :]  # row, column, y, x
        pixels = nodes.reshape(last, -1, size * size, 3)
        around = nodes("Gather", pixels, places.reshape(-1).astype(np.int32), axis=1)
        around = nodes.reshape(around, -1, config.tokens, wide, wide, 3)
        stay = np.zeros(config.taps, np.float32)
        stay[reach] = warp.STAY
        taps = np.array([config.taps] * 2, np.int64)
        seen = around
        for axis, logits in enumerate(nodes.several("Split", 2, self._logits, taps, axis=2), 2):
            logits = nodes.add(logits, stay)
            if config.warp_sharpness != 1:
                logits = nodes.mul(logits, np.float32(config.warp_sharpness))
            filter_ = nodes("Softmax", logits, axis=-1)
            terms = []
            for tap in range(config.taps):
                weight = nodes("Unsqueeze", nodes.slice(filter_, 2, tap, tap + 1), [3, 4])
                terms.append(nodes.mul(nodes.slice(seen, axis, tap, tap + patch), weight))
            seen = nodes.add(*terms)
        middle = nodes.slice(around, 2, reach, reach + patch)
        middle = nodes.slice(middle, 3, reach, reach + patch)
        return nodes.reshape(nodes("Sub", seen, middle), -1, config.tokens, patch * patch * 3)
