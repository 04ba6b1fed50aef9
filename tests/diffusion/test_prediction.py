"""Networks that predict clean samples, and the ramp weighting of losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser, schedule
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels
from cwm_jax.training import distillation, objective, self_generated
from cwm_jax.training.config import ContextConfig, ExampleConfig
from cwm_jax.training.examples import Example

KEY = jax.random.key(3)
RAMP = ExampleConfig().changed({"loss.weighting": "ramp"})


@pytest.fixture(scope="module")
def clip():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    return frames, np.array([[-1, 7, 2]] * 2, np.int32)


@pytest.fixture(scope="module")
def oracle(tiny):
    """A network that predicts the same clean frame whatever it sees, and that frame [H, W, 3]."""
    network = dataclasses.replace(tiny, prediction="clean")
    params = dit.init(network, 0)  # with zero weights in the last linear
    patch = np.random.default_rng(1).uniform(-0.9, 0.9, (16, 16, 3)).astype(np.float32)
    params["patch_out.bias"] = jnp.asarray(patch.reshape(-1))
    return network, params, np.tile(patch, (4, 4, 1))


def test_a_network_that_predicts_the_clean_frame_has_the_exact_velocity(oracle):
    network, params, frame = oracle
    t = jnp.array([[0, 14, 500, 900, 999]])
    x0 = jnp.broadcast_to(frame, (1, 5, 64, 64, 3))
    sample = schedule.noised(x0, t, jax.random.normal(KEY, x0.shape))
    bound, actions = denoiser.bind(network, params), jnp.zeros_like(t)
    velocity = bound(sample.x, t, actions)
    np.testing.assert_allclose(velocity, sample.velocity, atol=2e-4)  # at level 0 divided by 0.02
    np.testing.assert_allclose(bound.frames(sample.x, t, actions), x0, atol=1e-5)


@pytest.mark.parametrize(("steps", "window"), [(1, "exact"), (4, "exact"), (4, "cached")])
def test_the_sampler_generates_what_the_network_predicts(oracle, clip, steps, window):
    network, params, frame = oracle
    settings = SamplerConfig(levels=ddim_levels(steps), window=window)
    generator = Sampler(network, params, settings)
    begun = generator.start(*clip)
    _, generated = generator.rollout(begun, np.full((2, 4), 7), KEY)
    wanted = np.broadcast_to((frame + 1) * 127.5, generated.shape)
    np.testing.assert_allclose(generated, wanted, atol=1.01)


def test_self_generated_context_is_what_the_network_predicts(oracle, clip):
    network, params, frame = oracle
    frames, actions = to_model(jnp.asarray(clip[0])), jnp.asarray(clip[1])
    context = self_generated.Context(
        clips_B=jnp.array([False, True]),
        top_B=jnp.zeros(2, bool),
        t_BPT=jnp.full((2, 1, 3), 600),
        noise_BRHWC=jax.random.normal(KEY, frames.shape),
        start_noise_B=jnp.zeros(2),
    )
    for config in (ContextConfig(share=0.5), ContextConfig(share=0.5, steps=2)):
        given = frames, actions, jnp.full((2, 3), 400), context, config
        seen, _ = self_generated.with_generated(params, network, *given)
        clips = np.asarray(context.clips_B)
        np.testing.assert_allclose(
            seen[clips, 1:], jnp.broadcast_to(frame, (1, 2, 64, 64, 3)), atol=1e-4
        )
        np.testing.assert_array_equal(seen[~clips], frames[~clips])


def test_the_target_of_a_teacher_that_knows_the_frame_is_the_datas(oracle):
    network, params, frame = oracle
    t = jnp.array([[499, 999, 700, 249, 999]])
    x0 = jnp.broadcast_to(frame, (1, 5, 64, 64, 3))
    sample = schedule.noised(x0, t, jax.random.normal(KEY, x0.shape))
    taught = denoiser.bind(network, params)
    predict = lambda x, t: taught(x, t, jnp.zeros_like(t))
    target = distillation.velocity(predict, sample.x, t, 4)
    np.testing.assert_allclose(target, sample.velocity, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_the_ramp_is_the_weighted_error_of_clean_samples(network_of, clip, prediction):
    """Computed here from clean samples; the code computes it from velocities."""
    network, params = network_of(0)
    network = dataclasses.replace(network, prediction=prediction)
    frames, actions = clip
    t, noise = schedule.sample(KEY, frames.shape)
    t = t.at[0, 0].set(3).at[1, 1].set(999)
    x0 = to_model(frames)
    x = schedule.noised(x0, t, noise).x
    predicted = denoiser.bind(network, params).frames(x, t, actions)
    alpha_bar = schedule.alpha_bars()[np.asarray(t)].astype(np.float64)
    tau = 1 / (1 + np.sqrt(1 / alpha_bar - 1))
    errors = np.square(np.asarray(predicted, np.float64) - np.asarray(x0)).mean((2, 3, 4))
    loss = objective.clip_loss(
        params, Example(frames, actions, t, noise), network=network, config=RAMP
    )
    np.testing.assert_allclose(loss, ((0.9 * tau + 0.1) * errors).mean(), rtol=1e-3)


def test_the_share_of_signal_is_that_of_the_straight_path():
    """x, scaled, lies on the path τ x0 + (1 − τ) ε; the weight is 1 near the data, 0.1 at noise."""
    alpha_bar = np.linspace(0.001, 0.999, 50)
    weight = np.asarray(schedule.ramp(alpha_bar)) / (1 - alpha_bar)
    tau = (weight - 0.1) / 0.9
    np.testing.assert_allclose(tau / (1 - tau), np.sqrt(alpha_bar / (1 - alpha_bar)), rtol=1e-3)
    assert float(schedule.ramp(jnp.float32(0))) == pytest.approx(0.1)


def test_networks_with_warps_do_not_predict_clean_samples(tiny):
    for warp in (dict(warp_reach=1), dict(displacement_down=1)):
        with pytest.raises(UserError, match=r"prediction='clean' needs warp_reach=0"):
            dataclasses.replace(tiny, history=1, prediction="clean", **warp)


def test_what_is_predicted_identifies_a_network(tiny, tiny_params):
    clean = dataclasses.replace(tiny, prediction="clean")
    assert fingerprint(clean, tiny_params) != fingerprint(tiny, tiny_params)
