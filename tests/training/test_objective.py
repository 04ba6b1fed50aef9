"""Examples of clips: noise levels, self-generated context, mirrored clips."""

import functools

import jax
import numpy as np
import pytest
from tiny_network import of_one_block

from cwm_jax import coinrun
from cwm_jax.diffusion import denoiser, schedule
from cwm_jax.training import examples, objective, self_generated, train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.examples import Example

KEY = jax.random.key(3)

clip_loss = jax.jit(objective.clip_loss, static_argnames=("network", "config"))


@pytest.fixture(scope="module")
def shallow(tiny, tiny_params):
    return of_one_block(tiny, tiny_params)


def made(shape, settings=None):
    batch = {"frames": np.zeros(shape, np.uint8), "actions": np.zeros(shape[:2], np.int32)}
    return examples.make(KEY, batch, ExampleConfig().changed(settings or {}))


def test_levels_and_clips_have_the_configured_shares():
    shape = (200, 5, 2, 2, 3)
    assert (made(shape).t_BT == schedule.sample(KEY, shape)[0]).all()
    context = {"context.share": 0.25, "context.rounds": 3, "context.start_noise": 0.1}
    example = made(shape, context | {"noise_levels.top_share": 0.3})
    context = example.context
    assert 0.25 < (example.t_BT == 999).mean() < 0.35
    assert context.clips_B.mean() == 0.25
    assert not context.top_B.any()
    assert context.t_BPT.shape == (200, 3, 5)
    assert 0.25 < (context.t_BPT == 999).mean() < 0.35
    of_its_own = (
        context.noise_BRHWC * example.noise_BTHWC
    )  # otherwise the real frame could be inferred
    assert abs(of_its_own.mean()) < 0.05
    assert 0.07 < context.start_noise_B.mean() < 0.09  # |N(0, 0.1)| is 0.08 on the mean


def test_some_clips_have_only_the_highest_noise_level():
    """Every level of such a clip is the highest, in its rounds and in the loss."""
    shape = (400, 3, 2, 2, 3)
    settings = {"context.share": 0.5, "context.rounds": 2}
    example = made(shape, settings | {"context.top_share": 0.4})
    top = (example.context.t_BPT == 999).all((1, 2))
    assert 0.3 < top.mean() < 0.5
    assert (top == example.context.top_B).all()
    plain = made(shape, settings)
    assert (plain.t_BT == example.t_BT).all()  # `clip_loss` raises those of such clips alone
    assert (plain.context.t_BPT == example.context.t_BPT)[~top].all()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6, 1.0])
def test_every_whole_part_of_a_batch_has_the_same_clips_generated(share):
    whole = self_generated.clips(40, share)
    assert whole.mean() == pytest.approx(share)
    np.testing.assert_array_equal(whole, np.tile(self_generated.clips(20, share), 2))


def test_in_a_mirror_left_and_right_are_exchanged_and_nothing_else():
    for action in range(-1, coinrun.NUM_ACTIONS):
        other = coinrun.mirrored(action)
        keys, seen = coinrun.action_keys(action), coinrun.action_keys(other)
        assert (seen.left, seen.right) == (keys.right, keys.left)
        assert (seen.up, seen.down) == (keys.up, keys.down)
        assert coinrun.mirrored(other) == action
    assert coinrun.mirrored(coinrun.JUMP_LEFT) == coinrun.JUMP_RIGHT
    assert coinrun.mirrored(9) == 9  # a key without effect


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    actions = rng.integers(-1, coinrun.NUM_ACTIONS, (40, 3)).astype(np.int32)
    return {"frames": rng.integers(0, 256, (40, 3, 4, 4, 3), np.uint8), "actions": actions}


def in_a_mirror(batch):
    other = np.array([[coinrun.mirrored(a) for a in row] for row in batch["actions"].tolist()])
    return {"frames": batch["frames"][:, :, :, ::-1], "actions": other}


def test_a_share_of_the_clips_is_mirrored_completely(batch):
    found = jax.device_get(examples.mirrored(KEY, batch, 0.5))
    flipped = in_a_mirror(batch)
    same = lambda a, b: (a == b).all(axis=(1, 2, 3, 4))
    mirrored = same(found["frames"], flipped["frames"])
    assert (mirrored ^ same(found["frames"], batch["frames"])).all()
    assert 0.25 < mirrored.mean() < 0.75
    wanted = np.where(mirrored[:, None], flipped["actions"], batch["actions"])
    assert (found["actions"] == wanted).all()
    for share, whole in ((0.0, batch), (1.0, flipped)):
        found = examples.mirrored(KEY, batch, share)
        assert all((found[name] == whole[name]).all() for name in whole)


@pytest.fixture(scope="module")
def clips():
    frames = np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    return {"frames": frames, "actions": np.array([[-1, 7, 2], [-1, 4, 8]], np.int32)}


def first_loss(network, clips, settings=None):
    """Of a training step from the start."""
    optim = train_step.OptimizerConfig(
        lr=1e-3, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0
    )
    learned = ExampleConfig().changed(settings or {})
    setup = train_step.TrainSetup(network=network, optim=optim, examples=learned)
    state = train_step.init_state(network, optim, 0)
    _, metrics = train_step.train_step(state, clips, KEY, setup)
    return float(metrics["train/loss"])


def test_mirrored_clips_give_the_loss_of_mirrored_data(shallow, clips):
    tiny, _ = shallow
    found, plain = first_loss(tiny, clips, {"augment.mirror_share": 1.0}), first_loss(tiny, clips)
    assert found == pytest.approx(first_loss(tiny, in_a_mirror(clips)), rel=1e-6)
    assert found != pytest.approx(plain, rel=1e-6)


def test_errors_in_the_middle_have_the_configured_weight(shallow, clips):
    weights = objective._weights(64, 10.0)
    assert weights.mean() == pytest.approx(1)
    assert weights[32, 32] == pytest.approx(10 * weights[0, 0])
    assert (weights > 1).sum() == 16 * 16  # a quarter of each side
    assert weights[24:40, 24:40].min() > 1

    (tiny, tiny_params), frames, actions = shallow, clips["frames"], clips["actions"]
    given = Example(frames, actions, *schedule.sample(KEY, frames.shape))
    loss = functools.partial(clip_loss, tiny_params, given, network=tiny)
    sample = schedule.noised(coinrun.to_model(frames), given.t_BT, given.noise_BTHWC)
    net = jax.jit(lambda *args: denoiser.bind(tiny, tiny_params)(*args))
    squares = np.square(net(sample.x, given.t_BT, actions) - sample.velocity)
    assert loss() == pytest.approx(squares.mean(), rel=1e-5)
    weighted = loss(config=ExampleConfig().changed({"loss.middle_weight": 10.0}))
    assert weighted == pytest.approx((squares * weights).mean(), rel=1e-5)
    assert weighted != pytest.approx(float(loss()), rel=1e-6)


def test_the_middle_weighs_in_a_training_step(shallow, clips):
    tiny, _ = shallow
    weighed = first_loss(tiny, clips, {"loss.middle_weight": 10.0})
    assert weighed != pytest.approx(first_loss(tiny, clips), rel=1e-6)
