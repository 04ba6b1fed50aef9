"""Heads: they change nothing else, learn from batches, and fit a network that stays as it is."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.data.clips import Episodes
from cwm_jax.data.records import Episode, Outcomes
from cwm_jax.errors import UserError
from cwm_jax.evaluation import outcomes
from cwm_jax.models import dit, heads
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.play.inference import engine
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels
from cwm_jax.training import examples, frozen_heads, objective, train_step
from cwm_jax.training.config import ExampleConfig, LossConfig, OptimizerConfig
from cwm_jax.training.train_step import TrainSetup


@pytest.fixture(scope="module")
def with_heads(tiny):
    return dataclasses.replace(tiny, heads=True)


def test_the_other_parameters_begin_as_without_heads(tiny, with_heads):
    plain, more = dit.init(tiny, 0), dit.init(with_heads, 0)
    assert {name for name in more if not name.startswith(heads.PREFIX)} == set(plain)
    for name, leaf in plain.items():
        np.testing.assert_array_equal(leaf, more[name])
    assert set(dit.with_heads(tiny, more, 0)) == set(plain)
    again = dit.with_heads(with_heads, plain, 0)
    assert all((again[name] == leaf).all() for name, leaf in more.items())


def test_a_network_with_heads_is_the_same_to_those_who_only_see_frames(
    tiny, tiny_params, with_heads
):
    params = dit.with_heads(with_heads, tiny_params, 5)
    assert fingerprint(with_heads, params) == fingerprint(tiny, tiny_params)
    assert DiTConfig(**{k: v for k, v in dataclasses.asdict(tiny).items() if k != "heads"}) == tiny
    with pytest.raises(UserError, match=r"model\.heads"):
        dataclasses.replace(tiny, heads=2)


def test_the_programs_that_generate_frames_do_not_know_of_heads(network_of):
    """The same program text, so the same frames to the last bit."""

    def programs(network, params):
        config = SamplerConfig(levels=ddim_levels(2), window="hop")
        made = Sampler(network, params, config)
        static = dict(network=network, config=config)
        frames = np.zeros((2, network.max_frames - 1, 64, 64, 3), np.uint8)
        start = frames, np.zeros(frames.shape[:2], np.int32), np.int32(1)
        begun = sampler._start.lower(made._params, made._tables, *start, **static)
        state = jax.eval_shape(lambda: sampler._start(made._params, made._tables, *start, **static))
        rest = np.zeros((2, 3), np.int32), jax.random.key(0)
        yield begun.as_text()
        yield sampler._rollout.lower(made._params, made._tables, state, *rest, **static).as_text()
        play = engine.Engine(network, params, steps=(1,))
        frame, context = np.zeros((64, 64, 3), np.uint8), play._context
        append = jax.jit(engine._append, static_argnames="network")
        args = play._params, context, play._fresh, frame, np.int32(0)
        yield append.lower(*args, network=network).as_text()

    network, params = network_of(2)
    more = dataclasses.replace(network, heads=True)
    plain = list(programs(network, params))
    assert plain == list(programs(more, dit.with_heads(more, params, 5)))


def batch_of(rng, *, clips=8, frames=5):
    """Noise in which the colour of a frame and the action pressed at it decide what follows."""
    actions = rng.integers(15, size=(clips, frames + 1)).astype(np.int32)
    red = rng.random((clips, frames)) < 0.5
    images = rng.integers(100, size=(clips, frames, 64, 64, 3), dtype=np.uint8)
    images[..., 0] += np.where(red, 150, 0).astype(np.uint8)[..., None, None]
    pressed = actions[:, 1:]
    return {
        "frames": images,
        "actions": actions[:, :-1],
        "pressed": pressed,
        "rewards": np.where(red & (pressed < 7), 10.0, 0).astype(np.float32),
        "ends": red.astype(np.float32),
    }


def test_training_learns_outcomes_and_data_without_them_counts_for_nothing(with_heads):
    with_heads = dataclasses.replace(with_heads, depth=1)
    rng = np.random.default_rng(0)
    config = ExampleConfig(loss=LossConfig(outcome_weight=1.0))
    optim = OptimizerConfig(lr=3e-3, weight_decay=0, warmup_steps=0)
    setup = TrainSetup(network=with_heads, optim=optim, examples=config)
    state = train_step.init_state(with_heads, optim, 0)
    key = jax.random.key(0)

    def loss(params, batch):
        example = examples.make(key, batch, config)
        return objective.clip_loss(params, example, network=with_heads, config=config)

    batch = batch_of(rng)
    unknown = batch | {key: np.full_like(batch[key], np.nan) for key in ("rewards", "ends")}
    plain = {key: batch[key] for key in ("frames", "actions")}
    grad = jax.jit(jax.value_and_grad(loss))
    value, grads = grad(state.params, unknown)
    assert value == grad(state.params, plain)[0]
    assert not any(g.any() for name, g in grads.items() if name.startswith(heads.PREFIX))
    of_outcomes = lambda params: grad(params, batch)[0] - grad(params, plain)[0]
    before = of_outcomes(state.params)
    for _ in range(15):
        state, _ = train_step.train_step(state, batch_of(rng), key, setup)
    assert of_outcomes(state.params) < 0.6 * before


def test_a_mirror_exchanges_what_is_pressed_too():
    batch = jax.tree.map(jnp.asarray, batch_of(np.random.default_rng(0), clips=2))
    turned = examples.mirrored(jax.random.key(0), batch, 1.0)
    known = dict(
        zip(batch["actions"].ravel().tolist(), turned["actions"].ravel().tolist(), strict=True)
    )
    for one, other in zip(batch["pressed"].ravel(), turned["pressed"].ravel(), strict=True):
        assert known.get(int(one), int(other)) == int(other)
    assert (turned["rewards"] == batch["rewards"]).all()


class Recorded(Episodes):
    """Episodes in memory: red in the last frames before an end, which any action brings."""

    def __init__(self, count):
        rng = np.random.default_rng(1)
        self.outcomes, self.lengths = True, np.full(count, 12)
        self._made = []
        for number in range(count):
            ends = number % 2 == 0
            frames = rng.integers(100, size=(12, 64, 64, 3), dtype=np.uint8)
            frames[11:, ..., 0] += np.uint8(150 * ends)
            done = np.arange(12) == (11 if ends else 12)
            known = Outcomes(np.where(done, 10, 0).astype(np.float32), done)
            actions = rng.integers(15, size=12).astype(np.int32)
            self._made.append(Episode(frames, actions, known))

    def __getitem__(self, number):
        return self._made[number]

    def __len__(self):
        return len(self._made)


def test_heads_are_fitted_to_a_network_that_stays_as_it_is(tiny, tiny_params, with_heads):
    data = Recorded(24)
    seen = frozen_heads.look(tiny, tiny_params, data, frames=120, seed=0)
    assert seen.targets.ends_BT.sum() >= 12
    params = frozen_heads.fit(with_heads, tiny_params, seen, epochs=60, seed=0)
    assert all(params[name] is leaf for name, leaf in tiny_params.items())
    predicted = outcomes.of_records(with_heads, params, data, range(24))
    for head in outcomes.HEADS:
        assert 0 < outcomes.best_threshold(predicted, head) < 1
    found = outcomes.summary(predicted)["end"]["events"]
    assert found["precision"]["mean"] == found["recall"]["mean"] == 1
    low = frozen_heads.shifted(params, end=0.9, reward=0.5)
    shifted = outcomes.of_records(with_heads, low, data, range(2))
    odds = lambda p: np.log(p / (1 - p))
    end = lambda record: odds(record.probability["end"].astype(float))
    np.testing.assert_allclose(end(shifted[0]), end(predicted[0]) - odds(0.9), atol=0.02)


def test_every_frame_is_counted_once_and_with_a_past():
    for length in (12, 13, 20, 47):
        found = list(outcomes.windows(length, 12))
        assert found[0].counted == 0
        assert found[-1].start == length - 12
        for before, after in itertools.pairwise(found):
            assert after.counted == before.start + 12
            assert after.counted - after.start >= 4


def test_scores_are_those_of_frames_and_of_first_named_events():
    real = np.zeros(10, bool)
    real[9] = True
    said = lambda *frames: np.isin(np.arange(10), frames) * 1.0
    record = lambda named, happened: outcomes.Predicted({"end": named}, {"end": happened})
    predicted = [
        record(said(7, 8), real),  # near enough as an event, wrong as a frame
        record(said(2, 9), real),  # right as a frame, too early as an event
        record(said(), real),
        record(said(5), np.zeros(10, bool)),
    ]
    predicted = [
        outcomes.Predicted(
            {**t.probability, "reward": t.probability["end"]},
            {**t.happened, "reward": t.happened["end"]},
        )
        for t in predicted
    ]
    found = outcomes.summary(predicted)["end"]
    assert found["frames"]["precision"]["mean"] == 1 / 5
    assert found["frames"]["recall"]["mean"] == 1 / 3
    assert found["frames"]["base_rate"] == 3 / 40
    assert found["events"]["precision"]["mean"] == 1 / 3
    assert found["events"]["recall"]["mean"] == 1 / 3
    assert "end by events" in outcomes.table("here", outcomes.summary(predicted))
