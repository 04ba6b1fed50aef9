"""Whether a long rollout still looks like its level: LPIPS to what is nearest in real frames of it.

No real frame shows what the player of a rollout would see, since that one walks elsewhere; but what
is seen is made of the same things. So each place of a generated frame is held against all places of
all given real frames of the level, by the features of LPIPS, and the nearest counts.
"""

from typing import NamedTuple

import numpy as np

from cwm_jax.evaluation import lpips as perceptual
from cwm_jax.evaluation.lpips import Lpips


class Nearest(NamedTuple):
    """Lower is better, float32 [F] each."""

    frame: np.ndarray  # LPIPS to the nearest real frame, as a whole
    places: np.ndarray  # the same place by place: the nearest place of any real frame


def distances(lpips: Lpips, generated_FHWC: np.ndarray, real_RHWC: np.ndarray) -> Nearest:
    """Of each frame to what is nearest in real ones of the same level.

    Raises:
        UserError: pictures that LPIPS cannot compare.
    """
    generated, real = (perceptual.vectors(lpips, x) for x in (generated_FHWC, real_RHWC))
    whole = sum(_squared(*map(_flat, pair)) for pair in zip(generated, real, strict=True))
    return Nearest(whole.min(1), sum(map(_of_places, generated, real)))


def _flat(vectors_NhwC: np.ndarray) -> np.ndarray:
    return vectors_NhwC.reshape(len(vectors_NhwC), -1)


def _of_places(generated_FhwC: np.ndarray, real_RhwC: np.ndarray) -> np.ndarray:
    """The sum over places of each frame of the squared distance to the nearest place, [F]."""
    references = real_RhwC.reshape(-1, real_RhwC.shape[-1])
    frames = generated_FhwC.reshape(len(generated_FhwC), -1, generated_FhwC.shape[-1])
    return np.array([_squared(places, references).min(1).sum() for places in frames], np.float32)


def _squared(a_NC: np.ndarray, b_MC: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs, [N, M]; not below 0, whatever is rounded."""
    lengths = np.square(a_NC).sum(1)[:, None] + np.square(b_MC).sum(1)
    return np.maximum(lengths - 2 * a_NC @ b_MC.T, 0)
