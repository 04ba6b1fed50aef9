"""Scores of every generated frame against the real one, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.evaluation import image_metrics
from cwm_jax.evaluation.lpips import Lpips, distances

_CLIPS = 16  # scored in one call of the device


class Scores(NamedTuple):
    """float32 [B, F] each."""

    psnr: np.ndarray  # dB, infinite where a frame equals the real one
    ssim: np.ndarray
    psnr_motion: np.ndarray  # dB, over pixels that changed since the last given frame; NaN: none
    lpips: np.ndarray | None = None  # lower is better; None: its weights are missing

    def measured(self) -> dict[str, np.ndarray]:
        """The scores that were computed, by name."""
        return {name: values for name, values in self._asdict().items() if values is not None}


def score(generated_BFHWC, real_BFHWC, given_BHWC, *, lpips: Lpips | None = None) -> Scores:
    """Scores frames against the real ones.

    Args:
        drawn_BFHWC, real_BFHWC: uint8.
        given_BHWC: the last frame of the prompt, uint8: pixels that still have its colour do not
            count as motion.
        lpips: its network; without it there is no LPIPS.
    """
    clips = min(_CLIPS, len(generated_BFHWC))
    parts = []
    for first in range(0, len(generated_BFHWC), clips):
        rows = np.minimum(np.arange(first, first + clips), len(generated_BFHWC) - 1)
        part = _score(*(x[rows] for x in (generated_BFHWC, real_BFHWC, given_BHWC)))
        parts.append(jax.device_get(part))
    whole = (np.concatenate(x)[: len(generated_BFHWC)] for x in zip(*parts, strict=True))
    return Scores(*whole, distances(lpips, generated_BFHWC, real_BFHWC) if lpips else None)


@jax.jit
def _score(generated_BFHWC, real_BFHWC, given_BHWC) -> tuple[jax.Array, jax.Array, jax.Array]:
    # One frame of all clips at a time: SSIM needs a dozen float32 copies of its input.
    def of_frame(pair):
        generated, real = (frames.astype(jnp.float32) for frames in pair)
        changed = (pair[1] != given_BHWC).any(-1)
        # Errors of integers are exact: those of equal frames are 0, not nearly 0.
        psnr = lambda error: image_metrics.psnr_of_mse(error / 255**2)
        return (
            psnr(image_metrics.mse(generated, real)),
            image_metrics.ssim(generated / 255, real / 255),
            psnr(image_metrics.masked_mse(generated, real, changed)),
        )

    pairs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (generated_BFHWC, real_BFHWC))
    return jax.tree.map(lambda x: x.T, jax.lax.map(of_frame, pairs))
