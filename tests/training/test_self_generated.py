"""Self-generated context frames, and the targets after them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling import sampler
from cwm_jax.training import examples, objective, self_generated, train_step
from cwm_jax.training.config import ExampleConfig

KEY = jax.random.key(3)
DISPLACEMENT = (2, 1)  # rows, columns by which `moving_clip` moves per frame

rollout = jax.jit(self_generated.rollout, static_argnames=("network", "steps"))


@pytest.fixture(scope="module")
def network() -> DiTConfig:
    sizes = dict(hidden_size=24, depth=1, num_heads=3, patch_size=16, image_size=64)
    reach = dict(displacement_down=3, displacement_across=3, displacement_patch=8)
    rest = dict(num_actions=15, max_frames=5, dtype="float32", history=2, qk_norm=True)
    return DiTConfig(**sizes, **reach, **rest)


@pytest.fixture(scope="module")
def params(network):
    """Without zeros: the last layers of initial ones are zero."""
    shapes = sorted(dit.shapes(network).items())
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)) for name, x in shapes}


def moving_clip(frames=5):
    """A picture of large blocks that moves as a whole, uint8 [1, T, 64, 64, 3]."""
    wide = np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)
    wide = wide.repeat(8, axis=0).repeat(8, axis=1)
    rows, columns = DISPLACEMENT
    at = [(rows * t, columns * t) for t in range(frames)]
    return np.stack([wide[y : y + 64, x : x + 64] for y, x in at])[None]


def batch_of(clips):
    actions = np.full((clips, 5), 7, np.int32)
    actions[:, 0] = -1
    return {"frames": moving_clip().repeat(clips, axis=0), "actions": actions}


def context_of(batch, *, steps):
    settings = {"context.share": 1.0, "context.steps": steps}
    return examples.make(KEY, batch, ExampleConfig().changed(settings)).context


def by_the_sampler(network, params, batch, noise_BRHWC, count):
    """The first frame of each clip, and what the sampler generates after it: `count` in all."""
    config = sampler.SamplerConfig(levels=sampler.ddim_levels(2), window="cached")
    net = denoiser.bind(network, params)
    tables = jax.jit(lambda: sampler.tabulate(net, config))()
    next_frame = jax.jit(functools.partial(sampler.step, net, tables, config=config))
    prompt = batch["frames"][:, :1], batch["actions"][:, :1]
    world = sampler.Sampler(network, params, config).start(*prompt)
    frames = [to_model(prompt[0][:, 0])]
    for t in range(1, count):
        world, frame = next_frame(world, batch["actions"][:, t], noise_BRHWC[:, t], None)
        frames.append(frame)
    return np.stack(frames, axis=1)


def test_a_rollout_is_the_samplers(network, params):
    """After one given frame, in as many steps, from the same noise."""
    batch = batch_of(2)
    context = context_of(batch, steps=2)
    given = to_model(batch["frames"]), jnp.asarray(batch["actions"])
    found = rollout(params, network, *given, context, steps=2)
    wanted = by_the_sampler(network, params, batch, context.noise_BRHWC, 5)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_array_equal(found[:, 0], given[0][:, 0])


def test_a_rollout_starts_with_the_configured_noise(network, params):
    batch = batch_of(2) | {"frames": np.full((2, 5, 64, 64, 3), 127, np.uint8)}
    context = context_of(batch, steps=1)
    context = context._replace(start_noise_B=jnp.array([0.0, 0.1]))
    given = to_model(batch["frames"]), jnp.asarray(batch["actions"])
    found = rollout(params, network, *given, context, steps=1)
    noise = np.asarray(found[:, 0] - given[0][:, 0])
    assert not noise[0].any()
    assert noise[1].std() == pytest.approx(0.1, rel=0.03)


def lead_batch(clips, lead):
    """Clips of a moving picture with `lead` frames more, and actions that differ."""
    frames = moving_clip(5 + lead).repeat(clips, axis=0)
    actions = np.arange(clips * (5 + lead), dtype=np.int32).reshape(clips, -1) % 15
    return {"frames": frames, "actions": actions}


def with_lead(batch, count, *, lead):
    """An example whose lead has `count` frames."""
    settings = {"context.share": 1.0, "context.steps": 2, "context.lead": lead}
    config = ExampleConfig().changed(settings)
    for number in range(100):
        example = examples.make(jax.random.key(number), batch, config)
        if int(example.context.lead.count_B[0]) == count:
            return example, config
    raise AssertionError(f"no lead of {count} frames")


@pytest.mark.parametrize("count", [0, 3])
def test_the_frames_of_an_example_follow_its_lead(count):
    batch = lead_batch(2, 3)
    example, _ = with_lead(batch, count, lead=3)
    np.testing.assert_array_equal(example.frames_BTHWC, batch["frames"][:, count : count + 5])
    np.testing.assert_array_equal(example.actions_BT, batch["actions"][:, count : count + 5])
    assert (np.asarray(example.context.lead.count_B) == count).all()


@pytest.mark.parametrize("count", [0, 3])
def test_a_rollout_with_a_lead_is_the_samplers(network, params, count):
    """The last frames of a rollout of lead and clip, longer than the window of 5 frames."""
    batch = lead_batch(2, 3)
    example, _ = with_lead(batch, count, lead=3)
    given = to_model(example.frames_BTHWC), example.actions_BT
    found = rollout(params, network, *given, example.context, steps=2)
    noise = example.context.noise_BRHWC
    wanted = by_the_sampler(network, params, batch, noise, count + 5)[:, count:]
    assert wanted.shape == found.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_clips_whose_player_is_elsewhere_get_real_context(network, params):
    """Of the real frames of one clip the middle is changed, so that the rollout misses it."""
    batch = lead_batch(2, 3)
    example, config = with_lead(batch, 3, lead=3)
    frames = np.array(to_model(example.frames_BTHWC))
    rolled = np.array(
        rollout(params, network, frames, example.actions_BT, example.context, steps=2)
    )
    frames[0] = rolled[0]  # as the game went on
    frames[1, :, 24:40, 24:40] = np.where(rolled[1, :, 24:40, 24:40] > 0, -1, 1)
    given = frames, example.actions_BT, example.t_BT, example.context, config.context
    seen, _ = self_generated.with_generated(params, network, *given)
    np.testing.assert_allclose(seen[0], rolled[0], atol=1e-4)
    np.testing.assert_array_equal(seen[1], frames[1])


@pytest.mark.parametrize("lead", [0, 2])
def test_a_step_with_rollouts_does_not_depend_on_its_parts(network, params, lead):
    how = {"context.share": 0.5, "context.steps": 1, "context.lead": lead}
    how |= {"context.start_noise": 0.1, "context.persist_above": 0.1}
    noise, batch = ExampleConfig().changed(how), lead_batch(4, lead) if lead else batch_of(4)
    optim = train_step.OptimizerConfig(
        lr=1e-3, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0
    )
    setup = train_step.TrainSetup(network=network, optim=optim, examples=noise)
    parts = dataclasses.replace(setup, compute=train_step.ComputeConfig(accumulate_steps=2))
    example = examples.make(KEY, batch, noise)
    gradients = jax.jit(train_step.gradients, static_argnames="setup")
    loss, plain = gradients(params, example, setup)
    other_loss, others = gradients(params, example, parts)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-4)
    for name, gradient in plain.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(others[name], gradient, atol=1e-3 * scale, err_msg=name)


@pytest.mark.parametrize("lead", [0, 2])
def test_no_gradient_goes_through_a_rollout(network, params, lead):
    batch = lead_batch(2, lead) if lead else batch_of(2)
    settings = {"context.share": 1.0, "context.steps": 1, "context.lead": lead}
    noise = ExampleConfig().changed(settings)
    example = examples.make(KEY, batch, noise)
    given = to_model(example.frames_BTHWC), example.actions_BT, example.t_BT, example.context
    given += (noise.context,)
    total = lambda p: self_generated.with_generated(p, network, *given)[0].sum()
    assert all(not gradient.any() for gradient in jax.jit(jax.grad(total))(params).values())


def persistent(network, seen, free=True, above=0.1):
    """Targets of the last frame and the errors' best displacements, given the context shown."""
    net = denoiser.bind(network, {n: jnp.zeros(x.shape) for n, x in dit.shapes(network).items()})
    frames, earlier = to_model(moving_clip()), net.earlier(to_model(seen))
    errors = objective.displacement.errors(earlier[..., :3], frames, network.reach)
    free_hw = np.full(errors.shape[2:4], free)
    found, errors = self_generated.persistent(net, frames, earlier, errors, free_hw, above)
    best = objective.displacement.best(errors, network.reach)
    return np.asarray(found)[0, -1], np.asarray(best)[0, -1]


def test_self_generated_content_persists_and_moves_with_the_game(network):
    """A block that is not in the game moves with it."""
    seen, invented = moving_clip(), np.array([255, 0, 255], np.uint8)
    seen[0, -2, 32:64, 16:40] = invented
    target, best = persistent(network, seen)
    rows, columns = DISPLACEMENT
    reach = network.reach
    as_in_the_game = (rows + reach.down) * (2 * reach.across + 1) + columns + reach.across
    assert (best[4:7, 3] == as_in_the_game).all()
    np.testing.assert_allclose(target[32:56, 24:32], to_model(invented) * np.ones((24, 8, 1)))
    real = to_model(moving_clip())[0, -1]
    np.testing.assert_array_equal(target[:24], real[:24])  # correct content keeps the real target


def test_patches_that_are_not_free_keep_the_real_target(network):
    seen = moving_clip()
    seen[0, -2, 32:64, 16:40] = 255
    target, _ = persistent(network, seen, free=False)
    np.testing.assert_array_equal(target, to_model(moving_clip())[0, -1])


def test_small_errors_do_not_persist(network):
    seen = moving_clip().astype(int)
    seen[0, -2] += np.random.default_rng(2).integers(-6, 7, (64, 64, 3))
    target, _ = persistent(network, seen.clip(0, 255).astype(np.uint8))
    np.testing.assert_array_equal(target, to_model(moving_clip())[0, -1])
