"""Residuals from the last frame: history, generation, and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import of_one_block

from cwm_jax.checkpoints import torch_format
from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser, residual, schedule
from cwm_jax.errors import UserError
from cwm_jax.evaluation import rollout_quality, single_step
from cwm_jax.models import dit, flops
from cwm_jax.runtime import sharding
from cwm_jax.sampling import kv_cache, sampler, staggered_cache
from cwm_jax.sampling.sampler import Sampler, SamplerConfig
from cwm_jax.training import examples, objective, self_generated, train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.examples import Example

KEY = jax.random.key(3)
OPTIM = train_step.OptimizerConfig(
    lr=1e-2, weight_decay=0.0, warmup_steps=5, grad_clip=1.0, ema_decay=0.0
)


# What is one program where it is used is one here too: eagerly, each operation would be compiled.
clip_loss = jax.jit(objective.clip_loss, static_argnames=("network", "config"))
gradients = jax.jit(train_step.gradients, static_argnames="setup")


@functools.partial(jax.jit, static_argnums=0)
def predicted(config, params, *inputs):
    """The network's velocity for a sample, its noise levels, actions and earlier frames."""
    return denoiser.bind(config, params)(*inputs)


@pytest.fixture(scope="module")
def known(network_of):
    return network_of(2)


@pytest.fixture(scope="module")
def shallow(known):
    """For what a loss is made of."""
    return of_one_block(*known)


def clip_of(frames=5, clips=2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (clips, frames, 64, 64, 3), np.uint8)
    actions = rng.integers(0, 15, (clips, frames), np.int32)
    actions[:, 0] = -1
    return pixels, actions


def test_the_frames_before_each(tiny):
    config = dataclasses.replace(tiny, history=3)
    frames = jnp.arange(1, 6.0).reshape(1, 5, 1, 1, 1) * jnp.ones(3)
    shown = residual.earlier(config, frames)[0, :, 0, 0, ::3]
    assert shown.tolist() == [[1, 1, 1], [1, 1, 1], [2, 1, 1], [3, 2, 1], [4, 3, 2]]


def test_to_frame_inverts_to_sample(known):
    config, _ = known
    frames = to_model(jnp.asarray(clip_of()[0]))
    earlier = residual.earlier(config, frames)
    sample = residual.to_sample(config, frames, earlier)
    assert (sample[:, 0] == 0).all()
    np.testing.assert_allclose(
        sample[:, 3], (frames[:, 3] - frames[:, 2]) / config.residual_scale, atol=1e-6
    )
    np.testing.assert_allclose(residual.to_frame(config, sample, earlier), frames, atol=1e-6)
    assert np.abs(residual.to_frame(config, 100 * sample, earlier)).max() == 1


def test_an_untrained_network_repeats_the_last_frame(known):
    config = dataclasses.replace(known[0], warp_reach=0)  # a warp blurs slightly
    prompt, actions = clip_of(frames=3)
    generator = Sampler(config, dit.init(config, 0), SamplerConfig(levels=(999,)))
    _, generated = generator.rollout(generator.start(prompt, actions), [[7, 7], [1, 1]], KEY)
    off = np.abs(np.asarray(generated, int) - prompt[:, -1:])
    assert off.max() <= 3  # the remaining noise of one step: √ᾱ of it, times `residual_scale`


def test_history_influences_its_frame_and_later_ones(known):
    config, params = known
    keys = jax.random.split(KEY, 2)
    sample = jax.random.normal(keys[0], (1, 5, 64, 64, 3))
    earlier = jax.random.normal(keys[1], (1, 5, 64, 64, 6))
    t, actions = jnp.full((1, 5), 400), jnp.zeros((1, 5), jnp.int32)

    def output_of(frame, earlier):
        generated = denoiser.bind(config, params)(sample, t, actions, earlier)
        return jnp.square(generated[0, frame]).sum()

    influence = jax.jit(jax.vmap(jax.grad(output_of, argnums=1), in_axes=(0, None)))
    gradients = np.abs(influence(jnp.arange(5), earlier)[:, 0])  # [output, input, H, W, 6]
    reach = gradients.sum((2, 3, 4))
    assert (np.triu(reach, 1) == 0).all()
    assert (np.tril(reach) + np.triu(np.ones((5, 5)), 1) > 0).all()
    assert (gradients[4, 4].sum((0, 1)) > 0).all()  # all of the six channels


def test_a_players_cache_equals_a_world_that_starts_with_its_first_frame(known):
    config, params = known
    prompt, _ = clip_of(frames=3, clips=1)
    net = denoiser.bind(config, params)
    context = sampler.tabulate(net, SamplerConfig()).context
    actions = jnp.array([[-1, 7, 1]])
    pad = ((0, 0), (0, 1))
    frames = jnp.pad(to_model(prompt), (*pad, (0, 0), (0, 0), (0, 0)))
    start, append = (
        jax.jit(functools.partial(function, net, context))
        for function in (kv_cache.start, staggered_cache.append)
    )
    begun = start(frames, jnp.pad(actions, pad, constant_values=-1), 3)
    kept = staggered_cache.fresh(begun)
    for number in range(3):
        kept = append(kept, prompt[0, number], actions[0, number])
    for one, other in zip(
        jax.tree.leaves(kept.in_use().kv), jax.tree.leaves(begun.kv), strict=True
    ):
        np.testing.assert_allclose(one[:, :, :, :3], other[:, :, :, :3], atol=1e-4)


def test_the_first_frame_of_a_clip_does_not_count(shallow):
    config, params = shallow
    frames, actions = clip_of()
    t, noise = schedule.sample(KEY, frames.shape)
    example = Example(frames, actions, t, noise)
    loss = clip_loss(params, example, network=config)
    earlier = residual.earlier(config, to_model(frames))
    x0 = residual.to_sample(config, to_model(frames), earlier)
    sample = schedule.noised(x0, t, noise)
    off = predicted(config, params, sample.x, t, actions, earlier) - sample.velocity
    np.testing.assert_allclose(loss, jnp.square(off[:, 1:]).mean(), rtol=1e-5)


def test_the_loss_with_self_generated_context(shallow):
    """The loss of a clip whose context was generated in two rounds, computed by hand."""
    config, params = shallow
    frames, actions = clip_of()
    t, noise = schedule.sample(KEY, frames.shape)
    own = context_of(frames, rounds=2)
    example = Example(frames, actions, t, noise, own)
    loss = lambda share: clip_loss(
        params,
        example,
        network=config,
        config=ExampleConfig().changed({"context.share": share, "context.rounds": 2}),
    )
    real = shown = to_model(frames)
    net = functools.partial(predicted, config, params)
    for number in (0, 1):
        beside, level = residual.earlier(config, shown), own.t_BPT[:, number]
        x0 = residual.to_sample(config, real, beside)
        start = schedule.noised(x0, level, own.noise_BRHWC).x
        generated = schedule.predict_clean(start, net(start, level, actions, beside), level)
        shown = residual.to_frame(config, generated, beside).at[:, 0].set(real[:, 0])
    beside = residual.earlier(config, shown)
    sample = schedule.noised(residual.to_sample(config, real, beside), t, noise)
    off = net(sample.x, t, actions, beside) - sample.velocity
    of_clips = jnp.square(off[:, 1:]).mean((1, 2, 3, 4))
    np.testing.assert_allclose(loss(1.0), of_clips.mean(), rtol=1e-4)
    # A clip outside of the share has real context.
    first = Example(*(x[:1] for x in (frames, actions, t, noise)))
    of_first = clip_loss(params, first, network=config)
    np.testing.assert_allclose(loss(0.5), (of_first + of_clips[1]) / 2, rtol=1e-4)


def context_of(frames, rounds=1):
    noise = ExampleConfig().changed({"context.share": 1.0, "context.rounds": rounds})
    batch = {"frames": frames, "actions": np.zeros(frames.shape[:2], np.int32)}
    return examples.make(jax.random.key(4), batch, noise).context


def test_no_gradient_goes_through_self_generated_frames(shallow):
    """The gradient of the last linear is as if the generated frames had been given."""
    config, params = shallow
    frames, actions = clip_of(clips=1)
    t, noise = schedule.sample(KEY, frames.shape)
    own = context_of(frames)
    real = to_model(frames)
    own_frames = lambda params: self_generated.in_rounds(
        denoiser.bind(config, params), real, actions, own
    )
    shown = residual.earlier(config, jax.jit(own_frames)(params))

    def given(params):
        sample = schedule.noised(residual.to_sample(config, real, shown), t, noise)
        off = denoiser.bind(config, params)(sample.x, t, actions, shown) - sample.velocity
        return jnp.square(off[:, 1:]).mean()

    example, of_noise = (
        Example(frames, actions, t, noise, own),
        ExampleConfig().changed({"context.share": 1.0}),
    )
    whole = lambda p: objective.clip_loss(p, example, network=config, config=of_noise)
    for one, other in zip(
        jax.tree.leaves(jax.jit(jax.grad(whole))(params)),
        jax.tree.leaves(jax.jit(jax.grad(given))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("share", "how"),
    [
        (0.5, dict(remat="gelu_norm", accumulate_steps=2)),
        (0.25, dict(remat="layer", accumulate_steps=2)),  # half a clip of each part
    ],
)
def test_self_generated_frames_do_not_depend_on_how_a_step_is_computed(shallow, share, how):
    config, params = shallow
    frames, actions = clip_of(clips=4, frames=3)
    noise = ExampleConfig().changed({"context.share": share, "context.rounds": 2})
    example = examples.make(KEY, {"frames": frames, "actions": actions}, noise)
    setup = train_step.TrainSetup(network=config, optim=OPTIM, examples=noise)
    loss, plain = gradients(params, example, setup)
    other_setup = dataclasses.replace(setup, compute=train_step.ComputeConfig(**how))
    other_loss, other = gradients(params, example, other_setup)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for name, gradient in plain.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(other[name], gradient, atol=1e-4 * scale, err_msg=name)


def test_evaluated_frames_are_the_trained_ones(known):
    """Validation ignores the first frame; reconstructions add residuals to the previous frames."""
    config, params = known
    frames, actions = clip_of(frames=11, clips=1)
    shown = {"frames": frames[:, :5], "actions": actions[:, :5], "mask": np.ones(1, np.float32)}
    measured = dict(single_step.validation(config, params, [shown], sharding.make_mesh()))
    t, noise = schedule.sample(jax.random.fold_in(jax.random.key(0), 0), frames[:, :5].shape)
    example_of_window = Example(frames[:, :5], actions[:, :5], t, noise)
    np.testing.assert_allclose(
        measured["val/loss"],
        clip_loss(params, example_of_window, network=config),
        rtol=1e-5,
    )
    generated = rollout_quality.reconstruction(config, params, frames, actions)
    first_window = rollout_quality.reconstruction(config, params, frames[:, :5], actions[:, :5])
    assert (generated[:, 4] == first_window[:, 4]).all()  # not as the second window's first
    silent = rollout_quality.reconstruction(config, dit.init(config, 0), frames, actions)
    assert (
        np.abs(silent.astype(int) - frames).max() <= 1
    )  # an untrained network does not change residuals


def test_operations_of_self_generated_context(known):
    config, _ = known
    count = functools.partial(flops.train_step, config, clips=2, frames=3)
    once = flops.forward(config, clips=2, frames=3)
    assert count(more_passes=3).total - count().total == pytest.approx(3 * once.total)


def test_the_original_has_no_such_network(known):
    config, params = known
    with pytest.raises(UserError, match=r"config\.model\.history=2"):
        torch_format.to_original(params, config)


def test_a_network_with_history_learns(shallow):
    """On stripes that move two pixels per frame, it does better than the last frame."""
    config, _ = shallow
    noise = ExampleConfig().changed({"noise_levels.top_share": 0.5, "context.share": 0.5})
    columns = np.arange(64) + 2 * np.arange(5)[:, None, None]
    stripes = np.where(columns // 8 % 2, 220, 30).astype(np.uint8) * np.ones((5, 64, 1), np.uint8)
    frames = np.repeat(stripes[None, ..., None], 3, axis=-1).repeat(2, axis=0)
    batch = {"frames": frames, "actions": np.array([[-1, 7, 7, 7, 7]] * 2, np.int32)}
    example = Example(*batch.values(), np.full((2, 5), 999), jax.random.normal(KEY, frames.shape))
    loss_of = lambda state: clip_loss(state.params, example, network=config)
    setup = train_step.TrainSetup(network=config, optim=OPTIM, examples=noise)
    state = train_step.init_state(config, OPTIM, 0)
    untrained = loss_of(state)
    for _ in range(20):
        state, _ = train_step.train_step(state, batch, KEY, setup)
    assert loss_of(state) < 0.5 * untrained
