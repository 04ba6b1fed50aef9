"""The probe's features: the motion of the picture, and a crop of its centre with the player.

Keys change velocities, and the player is in the middle of the picture while the level scrolls.
So a frame becomes a cost volume (as in PWC-Net, Sun et al. 2018,
https://arxiv.org/abs/1709.02371), how well it fits the previous frame under every small shift, and
a crop of its middle, which shows the player and the ground below. Neither has parameters:
features are computed once, before training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DOWN, ACROSS = 9, 2  # pixels; from frame to frame the game moves by up to 8 and by 2
MIDDLE = 16  # pixels on a side
SHIFTS = (2 * DOWN + 1) * (2 * ACROSS + 1)


class Sight(NamedTuple):
    """Two neighbouring steps, or those of whole clips."""

    motion: np.ndarray  # float32 [..., steps, SHIFTS]
    middle: np.ndarray  # uint8 [..., frames, MIDDLE, MIDDLE, C]


def look(frames_BTHWC: np.ndarray) -> Sight:
    """All T − 1 steps and T frames of clips, uint8."""
    cut = (frames_BTHWC.shape[2] - MIDDLE) // 2
    middle = frames_BTHWC[:, :, cut : cut + MIDDLE, cut : cut + MIDDLE]
    return Sight(np.stack([np.asarray(_motion(clip)) for clip in frames_BTHWC]), middle)


def at(sight: Sight, places: np.ndarray) -> Sight:
    """The features of each of the frames 2 … T − 1 of clips: two steps, and two frames, up to it.

    Args:
        places: int [n], counted through all clips.
    """
    clip, start = np.divmod(places, sight.middle.shape[1] - 2)
    clip, two = clip[:, None], start[:, None] + np.arange(2)
    return Sight(sight.motion[clip, two], sight.middle[clip, two + 1])


def mirrored(sight: Sight) -> Sight:
    """As if left and right were exchanged."""
    motion = sight.motion.reshape(*sight.motion.shape[:-1], -1, 2 * ACROSS + 1)[..., ::-1]
    return Sight(motion.reshape(sight.motion.shape), sight.middle[..., ::-1, :])


@jax.jit
def _motion(frames_THWC: jax.Array) -> jax.Array:
    """How badly each frame fits the previous one under each shift: float32 [T − 1, SHIFTS].

    Logarithms of mean squared differences, less their mean: the values
    do not depend on contrast.
    """
    grey = frames_THWC.astype(jnp.float32).mean(-1) / 127.5
    before, after = grey[:-1], grey[1:, DOWN:-DOWN, ACROSS:-ACROSS]

    def cost(shift):
        y, x = jnp.divmod(shift, 2 * ACROSS + 1)
        shifted = jax.lax.dynamic_slice(before, (0, y, x), after.shape)
        return jnp.square(shifted - after).mean((1, 2))

    logs = jnp.log(jax.lax.map(cost, jnp.arange(SHIFTS)).T + 1e-4)
    return logs - logs.mean(-1, keepdims=True)
