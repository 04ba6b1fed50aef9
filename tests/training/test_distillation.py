"""Distillation to half of the steps: noise levels, targets, and training."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import of_one_block

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser, residual, schedule
from cwm_jax.runtime import sharding
from cwm_jax.sampling.sampler import ddim_levels
from cwm_jax.training import distillation, examples, objective, train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.examples import Example, Teacher

KEY = jax.random.key(3)
OPTIM = train_step.OptimizerConfig(
    lr=3e-3, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0
)


@pytest.fixture(scope="module")
def shallow_of(network_of):
    """`network_of`, with the first block alone."""
    return lambda history: of_one_block(*network_of(history))


@pytest.fixture(scope="module")
def clips():
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64, 3), np.uint8)
    return frames, np.array([[-1, 7, 2]] * 4, np.int32)


def altered(params):
    """A teacher that generates differently."""
    return {name: 0.9 * leaf for name, leaf in params.items()}


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_half_of_the_levels_are_where_the_students_steps_begin(steps):
    plain = jax.random.randint(KEY, (4000,), 0, 1000)
    t = np.asarray(distillation.sample_levels(KEY, plain, steps))
    is_step = np.isin(t, ddim_levels(steps))
    assert 0.46 < is_step.mean() < 0.54
    assert (t == plain)[~is_step].all()
    shares = [(t == level).mean() for level in ddim_levels(steps)]
    np.testing.assert_allclose(shares, 0.5 / steps, rtol=0.3)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 500])
def test_a_students_step_ends_where_the_sampler_begins_the_next(steps):
    levels = (*ddim_levels(steps), -1)
    every_level = np.arange(1000)
    ends = np.asarray(distillation._ends(jnp.asarray(every_level), steps))
    for begin, end in itertools.pairwise(levels):
        assert ends[begin] == end
    others = ~np.isin(every_level, levels)
    assert (ends == every_level)[others].all()


@pytest.mark.parametrize("steps", [1, 4])
def test_one_step_of_the_student_ends_where_two_of_the_teacher_do(steps):
    """By the sampler's formula, through the clean sample and the noise."""
    predict = lambda x, t: jnp.sin(3 * x) + 0.001 * t[..., None, None, None]
    alpha_bars = np.append(schedule.alpha_bars(), np.float32(1))

    def ddim(x, velocity, now, after):
        x0 = schedule.clean(x, velocity, alpha_bars[now])
        if after == -1:
            return x0
        noise = schedule.epsilon(x, x0, alpha_bars[now])
        return np.sqrt(alpha_bars[after]) * x0 + np.sqrt(1 - alpha_bars[after]) * noise

    of_student, of_teacher = ((*ddim_levels(n), -1) for n in (steps, 2 * steps))
    x = jax.random.normal(KEY, (1, 1, 8, 8, 3))
    for number, (begin, end) in enumerate(itertools.pairwise(of_student)):
        level = jnp.full((1, 1), begin)
        there = x
        for now, after in itertools.pairwise(of_teacher[2 * number :][:3]):
            there = ddim(there, predict(there, jnp.full((1, 1), now)), now, after)
        assert after == end
        once = distillation.velocity(predict, x, level, steps)
        np.testing.assert_allclose(ddim(x, once, begin, end), there, atol=2e-4)
    between = jnp.full((1, 1), 500)  # where no step begins
    plain = distillation.velocity(predict, x, between, steps)
    np.testing.assert_array_equal(plain, predict(x, between))


def test_a_perfect_teacher_gives_the_targets_of_the_data():
    t = distillation.sample_levels(KEY, jax.random.randint(KEY, (1, 60), 0, 1000), 4)
    x0, noise = jax.random.normal(jax.random.key(1), (2, 1, 60, 4, 4, 3))
    knowing = lambda x, t: schedule.noised(x0, t, noise).velocity
    found = distillation.velocity(knowing, schedule.noised(x0, t, noise).x, t, 4)
    np.testing.assert_allclose(found, knowing(None, t), atol=1e-5)


@pytest.mark.parametrize("history", [0, 2])
def test_the_loss_is_the_distance_to_the_teachers_steps(shallow_of, clips, history):
    """After the same frames and actions; and no gradient of it is the teacher's."""
    network, params = shallow_of(history)
    teacher = Teacher(altered(params), 2)
    frames, actions = clips
    t, noise = schedule.sample(KEY, frames.shape)
    t = t.at[:, 1].set(999).at[:2, 2].set(499)
    earlier = residual.earlier(network, to_model(frames))
    x = schedule.noised(residual.to_sample(network, to_model(frames), earlier), t, noise).x
    predict = jax.jit(lambda params, *args: denoiser.bind(network, params)(*args))
    taught = lambda x, t: predict(teacher.params, x, t, actions, earlier)
    wanted = distillation.velocity(taught, x, t, 2)
    off = predict(params, x, t, actions, earlier) - wanted
    clip_loss = jax.jit(objective.clip_loss, static_argnames="network")
    loss = functools.partial(clip_loss, params, Example(frames, actions, t, noise), network=network)
    counted = residual.counted(network)
    np.testing.assert_allclose(loss(teacher=teacher), jnp.square(off[:, counted]).mean(), rtol=1e-4)
    assert loss(teacher=teacher) != pytest.approx(float(loss()), rel=0.01)


def test_distillation_does_not_depend_on_how_an_update_is_computed(shallow_of, clips):
    network, params = shallow_of(2)
    teacher = Teacher(altered(params), np.int32(2))
    noise = ExampleConfig().changed({"context.share": 0.5})
    batch = dict(zip(("frames", "actions"), clips, strict=True))
    example = examples.make(KEY, batch, noise, teacher)
    parts = train_step.ComputeConfig(accumulate_steps=2, remat="layer")

    def gradients(**how):
        setup = train_step.TrainSetup(network=network, optim=OPTIM, examples=noise, **how)
        find = jax.jit(train_step.gradients, static_argnames="setup")
        return find(params, example, setup, teacher)

    loss, plain = gradients()
    other_loss, other = gradients(compute=parts, mesh=sharding.make_mesh())
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for name, gradient in plain.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(other[name], gradient, atol=1e-3 * scale, err_msg=name)


def test_a_student_approaches_its_teachers_steps(shallow_of, clips):
    """On the same noise each time, from which one step has to reach the end of two."""
    network, params = shallow_of(2)
    teacher = Teacher(params, np.int32(1))
    noise = schedule.sample(KEY, clips[0].shape)[1]
    example = Example(*clips, jnp.full((4, 3), 999), noise)
    state = train_step.init_state(network, OPTIM, 0, jax.tree.map(jnp.copy, params))
    setup = train_step.TrainSetup(network=network, optim=OPTIM)
    update = jax.jit(functools.partial(train_step.update, setup=setup))
    losses = []
    for _ in range(40):
        state, metrics = update(state, example, teacher=teacher)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.75 * losses[0]


_FOUR_DEVICES = "--xla_force_host_platform_device_count=4"

IN_PARTS = """
import dataclasses, jax, numpy as np
from cwm_jax.training import examples, train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.models import dit
from cwm_jax.runtime import sharding
from tiny_network import TINY
network = dataclasses.replace(TINY, depth=1)
params, others = dit.init(network, 0), dit.init(network, 1)
teacher = examples.Teacher(others, np.int32(4))
frames = np.random.default_rng(0).integers(0, 256, (4, 2, 64, 64, 3), np.uint8)
actions = np.full((4, 2), 7, np.int32)
batch = {"frames": frames, "actions": actions}
example = examples.make(jax.random.key(0), batch, ExampleConfig(), teacher)
optim = train_step.OptimizerConfig(
    lr=1e-3, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0)
setup = train_step.TrainSetup(network=network, optim=optim)
alone = jax.jit(train_step.gradients, static_argnums=2)(params, example, setup, teacher)
mesh = sharding.make_mesh(2)
place = lambda tree: jax.device_put(tree, sharding.placement(tree, mesh))
params, teacher = place(params), teacher._replace(params=place(others))
setup = dataclasses.replace(setup, mesh=mesh)
shared = jax.jit(lambda p, t: train_step.gradients(p, example, setup, t))(params, teacher)
for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
print(jax.device_count(), "devices alike")
"""


def test_a_teacher_may_be_sharded_over_devices():
    """On devices that share the clips: two copies of teacher and student, each of two shards."""
    found = subprocess.run(
        [sys.executable, "-c", IN_PARTS],
        cwd=Path(__file__).parents[1],
        env=os.environ
        | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {_FOUR_DEVICES}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.stdout == "4 devices alike\n", found.stderr
