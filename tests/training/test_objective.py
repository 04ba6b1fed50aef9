"""Which examples are made of clips: noise labels, own drawings, mirrored clips."""

import functools

import jax
import numpy as np
import pytest

from cwm_jax import coinrun
from cwm_jax.diffusion import denoiser, schedule
from cwm_jax.training import objective, train_step

KEY = jax.random.key(3)


def test_labels_and_clips_are_drawn_in_the_shares_asked_for():
    shape = (200, 5, 2, 2, 3)
    t, _ = objective.draw(KEY, shape, objective.NoiseConfig())
    assert (t == schedule.draw(KEY, shape)[0]).all()
    noise = objective.NoiseConfig(top_share=0.3, own_share=0.25, own_passes=3)
    t, noise, *own = objective.draw(KEY, shape, noise)
    own = objective.Own(*own)
    assert 0.25 < (t == 999).mean() < 0.35
    assert own.clips_B.mean() == 0.25
    assert not own.blind_B.any()
    assert own.t_BPT.shape == (200, 3, 5)
    assert 0.25 < (own.t_BPT == 999).mean() < 0.35
    assert abs((own.noise_BTHWC * noise).mean()) < 0.05  # of its own, or it could be read off


def test_in_some_own_clips_nothing_betrays_the_real_frames():
    """Every label of such a clip is the highest, in its passes and where it is learned from."""
    noise = objective.NoiseConfig(own_share=0.5, own_passes=2, own_top_share=0.4)
    t, _, *own = objective.draw(KEY, (400, 3, 2, 2, 3), noise)
    own = objective.Own(*own)
    blind = (own.t_BPT == 999).all((1, 2))
    assert 0.3 < blind.mean() < 0.5
    assert (blind == own.blind_B).all()
    plain = objective.NoiseConfig(own_share=0.5, own_passes=2)
    before, _, *own_before = objective.draw(KEY, (400, 3, 2, 2, 3), plain)
    assert (before == t).all()  # `clip_loss` raises those of blind clips alone
    assert (objective.Own(*own_before).t_BPT == own.t_BPT)[~blind].all()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6, 1.0])
def test_every_whole_part_of_a_batch_has_the_same_clips_generated(share):
    whole = objective.generated_clips(40, share)
    assert whole.mean() == pytest.approx(share)
    part = objective.generated_clips(20, share)
    np.testing.assert_array_equal(whole, np.tile(part, 2))


def test_in_a_mirror_left_and_right_are_exchanged_and_nothing_else():
    for action in range(-1, coinrun.NUM_ACTIONS):
        other = coinrun.mirrored(action)
        keys, seen = coinrun.action_keys(action), coinrun.action_keys(other)
        assert (seen.left, seen.right) == (keys.right, keys.left)
        assert (seen.up, seen.down) == (keys.up, keys.down)
        assert coinrun.mirrored(other) == action
    assert coinrun.mirrored(coinrun.JUMP_LEFT) == coinrun.JUMP_RIGHT
    assert coinrun.mirrored(9) == 9  # a key that does nothing


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    actions = rng.integers(-1, coinrun.NUM_ACTIONS, (40, 3)).astype(np.int32)
    return {"frames": rng.integers(0, 256, (40, 3, 4, 4, 3), np.uint8), "actions": actions}


def in_a_mirror(batch):
    other = np.array([[coinrun.mirrored(a) for a in row] for row in batch["actions"].tolist()])
    return {"frames": batch["frames"][:, :, :, ::-1], "actions": other}


def test_a_share_of_the_clips_is_seen_in_a_mirror_whole(batch):
    found = jax.device_get(objective.mirrored(KEY, batch, 0.5))
    flipped = in_a_mirror(batch)
    same = lambda a, b: (a == b).all(axis=(1, 2, 3, 4))
    mirrored = same(found["frames"], flipped["frames"])
    assert (mirrored ^ same(found["frames"], batch["frames"])).all()
    assert 0.25 < mirrored.mean() < 0.75
    wanted = np.where(mirrored[:, None], flipped["actions"], batch["actions"])
    assert (found["actions"] == wanted).all()
    for share, whole in ((0.0, batch), (1.0, flipped)):
        found = objective.mirrored(KEY, batch, share)
        assert all((found[name] == whole[name]).all() for name in whole)


@pytest.fixture(scope="module")
def clips():
    frames = np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    return {"frames": frames, "actions": np.array([[-1, 7, 2], [-1, 4, 8]], np.int32)}


def first_loss(network, clips, **noise):
    """Of a training step from the start."""
    optim = train_step.OptimizerConfig(
        lr=1e-3, weight_decay=0.0, warmup_steps=0, grad_clip=1.0, ema_decay=0.0
    )
    noise = objective.NoiseConfig(**noise)
    state = train_step.init_state(network, optim, 0)
    _, told = train_step.train_step(state, clips, KEY, network=network, optim=optim, noise=noise)
    return float(told["train/loss"])


def test_mirrored_clips_are_learned_as_if_they_had_been_played_so(tiny, clips):
    found, plain = first_loss(tiny, clips, mirror_share=1.0), first_loss(tiny, clips)
    assert found == pytest.approx(first_loss(tiny, in_a_mirror(clips)), rel=1e-6)
    assert found != pytest.approx(plain, rel=1e-6)


def test_what_is_wrong_in_the_middle_counts_as_much_as_asked_for(tiny, tiny_params, clips):
    weights = objective._weights(64, 10.0)
    assert weights.mean() == pytest.approx(1)
    assert weights[32, 32] == pytest.approx(10 * weights[0, 0])
    assert (weights > 1).sum() == 16 * 16  # a quarter of each side
    assert weights[24:40, 24:40].min() > 1

    frames, actions = clips["frames"], clips["actions"]
    given = frames, actions, *schedule.draw(KEY, frames.shape)
    loss = functools.partial(objective.clip_loss, tiny_params, *given, network=tiny)
    sample = schedule.noised(coinrun.to_model(frames), *given[2:])
    net = denoiser.bind(tiny, tiny_params)
    squares = np.square(net(sample.x, given[2], actions) - sample.velocity)
    assert loss() == pytest.approx(squares.mean(), rel=1e-5)
    weighted = loss(noise=objective.NoiseConfig(middle_weight=10.0))
    assert weighted == pytest.approx((squares * weights).mean(), rel=1e-5)
    assert weighted != pytest.approx(float(loss()), rel=1e-6)


def test_the_middle_weighs_in_a_training_step(tiny, clips):
    weighed = first_loss(tiny, clips, middle_weight=10.0)
    assert weighed != pytest.approx(first_loss(tiny, clips), rel=1e-6)
