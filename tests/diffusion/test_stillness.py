"""What stands still in a generated frame stays exactly as it was."""

import dataclasses

import jax
import numpy as np
import pytest

from cwm_jax.diffusion import denoiser, stillness
from cwm_jax.errors import UserError
from cwm_jax.models import fingerprint
from cwm_jax.models.config import DiTConfig

THRESHOLD = 3.0  # colours of 0…255
PATCHES = (64 // stillness.PATCH) ** 2
RNG = np.random.default_rng(0)
LAST = RNG.uniform(-0.9, 0.9, (2, 64, 64, 3)).astype(np.float32)


def noisy(colours: float) -> np.ndarray:
    """The last frames with a change of this root mean square."""
    return LAST + np.float32(colours / 127.5) * RNG.choice([-1, 1], LAST.shape).astype(np.float32)


def kept(frames) -> np.ndarray:
    return np.asarray(jax.jit(stillness.kept, static_argnums=2)(frames, LAST, THRESHOLD))


def first(patches: int) -> np.ndarray:
    """The pixels of so many patches, row by row, bool [64, 64]."""
    chosen = (np.arange(PATCHES) < patches).reshape((64 // stillness.PATCH,) * 2)
    return chosen.repeat(stillness.PATCH, 0).repeat(stillness.PATCH, 1)


def replaced(frames, patches: int) -> np.ndarray:
    """The frames with new content in the first patches."""
    return np.where(first(patches)[..., None], -frames, frames)


def test_small_changes_are_dropped_and_others_stay():
    frames = replaced(noisy(2.9), patches=10)
    found = kept(frames)
    assert (found[:, ~first(10)] == LAST[:, ~first(10)]).all()
    assert (found[:, first(10)] == frames[:, first(10)]).all()


def test_larger_changes_stay():
    frames = noisy(3.1)
    assert (kept(frames) == frames).all()


@pytest.mark.parametrize("moving", [0, 1])
def test_a_frame_that_moves_is_left_alone_and_the_other_is_not(moving):
    most = int(PATCHES * (1 - stillness.SHARE))
    frames = replaced(noisy(0.5), patches=most)
    assert ((kept(frames) == LAST).mean((1, 2, 3)) > 0.89).all()
    frames[moving] = replaced(noisy(0.5), patches=most + 1)[moving]
    found = kept(frames)
    assert (found[moving] == frames[moving]).all()
    assert (found[1 - moving] == LAST[1 - moving]).mean() > 0.89


def test_a_world_that_hardly_changes_stands_still(network_of):
    """Frames of the sampler, from the denoiser's samples, while nothing is kept without it."""
    config, params = network_of(2)
    earlier = np.concatenate([LAST, LAST], axis=-1)
    sample = 0.01 * RNG.standard_normal(LAST.shape).astype(np.float32)
    finished = lambda config: np.asarray(denoiser.bind(config, params).finished(sample, earlier))
    assert (finished(dataclasses.replace(config, still_threshold=THRESHOLD)) == LAST).all()
    assert (finished(config) != LAST).mean() > 0.9


def test_it_needs_an_earlier_frame():
    with pytest.raises(UserError, match=r"still_threshold=3\.0 needs config\.model\.history"):
        DiTConfig(still_threshold=3.0)
    with pytest.raises(UserError, match="multiple of 4, not 10"):
        DiTConfig(still_threshold=3.0, history=1, image_size=10, patch_size=5)


def test_share_codes_tell_worlds_with_it_apart(network_of):
    config, params = network_of(2)
    still = dataclasses.replace(config, still_threshold=THRESHOLD)
    codes = {fingerprint.fingerprint(x, params) for x in (config, still)}
    assert len(codes) == 2
