"""Exported graphs in onnxruntime generate what the JAX sampler does, frame after frame."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.coinrun import to_model
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cwm_jax.onnx import folder
from cwm_jax.onnx.runtime import OnnxGenerator

PLAIN = DiTConfig(
    hidden_size=32,
    depth=2,
    num_heads=2,
    patch_size=16,
    image_size=32,
    num_actions=5,
    max_frames=6,
    dtype="float32",
)
NETWORKS = {
    "plain": PLAIN,  # as `configs/small.py`
    "displacement": dataclasses.replace(  # as `configs/pocket.py`
        PLAIN,
        history=3,
        displacement_down=3,
        displacement_across=2,
        displacement_patch=8,
        qk_norm=True,
    ),
    "clean": dataclasses.replace(PLAIN, history=1, prediction="clean"),
    "motion": dataclasses.replace(PLAIN, history=2, warp_reach=4, warp_sharpness=2.0),
    "buttons": dataclasses.replace(PLAIN, num_actions=3, action_encoding="buttons"),
}
NETWORKS["still"] = dataclasses.replace(NETWORKS["displacement"], still_threshold=70.0)
ACTIONS = tuple(np.random.default_rng(1).integers(0, 5, 40).tolist())


@functools.cache
def trained(kind):
    """A network of random numbers whose gates are open, so that every part of it counts."""
    network, rng = NETWORKS[kind], np.random.default_rng(0)
    params = {
        name: (0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in sorted(dit.shapes(network).items())
    }
    sampling = {"ddim_steps": 2, "playable_steps": [1, 2]}
    config = {"model": dataclasses.asdict(network), "sampler": sampling}
    return Trained(network, params, config, 7, None)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    @functools.cache
    def export(kind, dtype="float32"):
        out = tmp_path_factory.mktemp(f"{kind}-{dtype}")
        folder.write(trained(kind), out, steps=(1, 2), dtype=dtype)
        return out

    return export


def prompt(network, frames):
    rng = np.random.default_rng(frames)
    size = network.image_size
    pictures = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    return pictures, np.array([-1, *rng.integers(0, 3, frames - 1)])


@functools.cache
def jax_frames(kind, window, given=4, actions=ACTIONS):
    """Frames as the sampler keeps them, float32, and the noise that each began from."""
    network, key, steps = NETWORKS[kind], random_numbers.key(5), 2
    generator = Sampler(
        network, trained(kind).params, SamplerConfig(levels=ddim_levels(steps), window=window)
    )
    pictures, led_in = prompt(network, given)
    state, frames, noises = generator.start(pictures[None], led_in[None]), [], []
    for number, action in enumerate(actions, start=min(given, network.max_frames - 1)):
        noise, _ = sampler.frame_noise(jax.random.fold_in(key, number), (1, *pictures.shape[1:]))
        state, _ = generator.step(state, np.array([action]), key)
        frames.append(np.asarray(state.frames_BMHWC[0, number % (network.max_frames - 1)]))
        noises.append(np.asarray(noise[0]))
    return np.stack(frames), noises


def onnx_frames(path, window, noises, given=4, actions=ACTIONS):
    generator = OnnxGenerator(path, steps=2, window=window, threads=1)
    pictures, led_in = prompt(PLAIN, given)
    world, frames = generator.start(to_model(pictures), led_in), []
    for action, noise in zip(actions, noises, strict=True):
        world, frame = generator.step(world, action, noise)
        frames.append(frame)
    return np.stack(frames)


@pytest.mark.parametrize(
    ("kind", "window"),
    [(kind, "hop") for kind in NETWORKS] + [("plain", "cached"), ("displacement", "cached")],
)
def test_float32_is_the_sampler_to_1e_4_over_40_frames(exported, kind, window):
    wanted, noises = jax_frames(kind, window)
    found = onnx_frames(exported(kind), window, noises)
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(np.diff(wanted, axis=0)).max() > 0.1  # the picture moves


def test_what_hardly_changes_stays_in_some_frames():
    frames, _ = jax_frames("still", "hop")  # which the graphs generate too, above
    same = (np.diff(frames, axis=0) == 0).reshape(-1, 8, 4, 8, 4, 3).all((2, 4, 5))
    kept = same.mean((1, 2))
    assert (kept >= 0.9).any()
    assert (kept < 0.5).any()


@pytest.mark.parametrize("given", [1, 5, 6])  # 6: more than a world holds
def test_a_prompt_of_any_length_up_to_the_window(exported, given):
    wanted, noises = jax_frames("displacement", "hop", given, ACTIONS[:8])
    found = onnx_frames(exported("displacement"), "hop", noises, given, ACTIONS[:8])
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("window", ["cached", "hop"])
def test_float16_stays_within_2_of_255_levels(exported, window):
    wanted, noises = jax_frames("plain", window)
    found = onnx_frames(exported("plain", "float16"), window, noises)
    assert np.abs(found - wanted).max() * 127.5 < 2


def test_the_graphs_share_one_file_of_numbers(exported):
    half, whole = exported("plain", "float16"), exported("plain")
    sizes = [(path / folder.WEIGHTS).stat().st_size for path in (half, whole)]
    assert sizes[0] < 0.6 * sizes[1]  # tables stay in float32
    for path in whole.glob("*.onnx"):
        assert path.stat().st_size < 0.3 * sizes[1]


def test_damaged_weights_are_named(exported, tmp_path):
    for path in exported("plain").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    numbers = bytearray((tmp_path / folder.WEIGHTS).read_bytes())
    numbers[1000] ^= 1
    (tmp_path / folder.WEIGHTS).write_bytes(numbers)
    with pytest.raises(UserError, match=r"weights\.bin is damaged"):
        OnnxGenerator(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"\[1, 2\] steps, not 3"):
        OnnxGenerator(exported("plain"), steps=3)
