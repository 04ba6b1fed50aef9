"""Plays back real episodes without a network, to demonstrate the page."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cwm_jax.play.inference.engine import Lane
from cwm_jax.play.session.prompt_sources import ClipPrompts
from cwm_jax.play.session.share_code import MAX_FRAMES


class Place(NamedTuple):
    """A frame of an episode of the validation split."""

    episode: int
    frame: int


class RealClips:
    """Returns the episode's next real frame for any action; the interface of `engine.Engine`.

    A session from a picture continues with the first episode.
    """

    steps = automatic = (1,)
    playable = None
    slots = MAX_FRAMES  # so that a cache is always rebuilt from the session's first frame
    fingerprint = b"realclip"

    def __init__(self, prompts: ClipPrompts):
        self._episodes = prompts.episodes
        self._starts: dict[bytes, Place] = {}
        for clip in reversed(range(len(prompts))):
            place = Place(*prompts.clips.locate(clip))
            self._starts[_digest(self._frame(place))] = place

    def ready(self, steps: int) -> tuple[int, ...]:
        return (1, 2, 4, 8)

    def compile(self, steps: int, lanes: int) -> None:
        """Nothing is compiled here."""

    def fresh(self) -> None:
        return None

    def append(self, cache: Place | None, frame_u8_HWC: np.ndarray, action: int) -> Place:
        """The first frame determines the place; each later one advances it."""
        if cache is None:
            return self._starts.get(_digest(frame_u8_HWC), Place(0, 0))
        length = int(self._episodes.lengths[cache.episode])
        return Place(cache.episode, (cache.frame + 1) % length)

    def generate(self, wanted: Sequence[Lane], steps: int, lanes: int) -> np.ndarray:
        return np.stack([self._frame(self.append(lane.cache, None, 0)) for lane in wanted])

    def compile_unsure(self, steps: int) -> None:
        """Nothing is compiled here."""

    def unsure(self, wanted: Lane, steps: int) -> None:
        """Recordings are unsure of nothing."""

    def _frame(self, place: Place) -> np.ndarray:
        return self._episode(place.episode)[place.frame]

    def _episode(self, number: int) -> np.ndarray:
        if getattr(self, "_open", (None, None))[0] != number:
            self._open = number, self._episodes[number].frames
        return self._open[1]


def _digest(frame_HWC: np.ndarray) -> bytes:
    return hashlib.blake2b(frame_HWC.tobytes(), digest_size=16).digest()
