"""Heads fitted to a network that stays as it is: its frames do not change.

What the blocks make of recorded frames is computed once; the heads learn from it by themselves.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cwm_jax.coinrun import to_model
from cwm_jax.data.clips import Episodes, cut
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.models import dit, heads
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.models.layers import add
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling.sampler import SamplerConfig
from cwm_jax.training import objective
from cwm_jax.training.examples import Targets, mirrored

_CLIPS_AT_ONCE = 16
_BATCH, _RATE, _DECAY = 256, 1e-3, 1e-2


class Seen(NamedTuple):
    """N frames as the blocks leave them, and what the actions pressed at them led to."""

    tokens_NSD: np.ndarray  # float16, each token less its mean and over its deviation
    targets: Targets  # each [N]

    def __len__(self) -> int:
        return len(self.tokens_NSD)


def look(
    network: DiTConfig,
    params: Params,
    episodes: Episodes,
    *,
    frames: int,
    seed: int,
    watched: bool = False,
) -> Seen:
    """Some `frames` frames of recorded episodes, half of them mirrored where the game allows it.

    Two clips in three, as long as there are such, end with the last frame of an episode; the others
    are cut anywhere. Clips have the network's window, and their first third is a past alone.
    """
    rng = np.random.default_rng(seed)
    size = network.max_frames
    (eligible,) = np.nonzero(episodes.lengths >= size)
    count = max(1, frames // (size - size // 3))
    order = rng.permutation(eligible)
    ended = (int(n) for n in order if _ends(episodes, int(n)))
    at_ends = [_Clip(n, int(episodes.lengths[n]) - size) for n in islice(ended, 2 * count // 3)]
    cut_anywhere = [
        _Clip(int(n), int(rng.integers(episodes.lengths[n] - size + 1)))
        for n in rng.choice(eligible, count - len(at_ends))
    ]
    clips = sorted(at_ends + cut_anywhere)
    found = []
    starts = range(0, len(clips), _CLIPS_AT_ONCE)
    for first in tqdm(starts, "looking at frames", unit=" batches", disable=not watched):
        batch = clips[first : first + _CLIPS_AT_ONCE]
        found.append(_seen(network, params, episodes, batch, seed + first))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    known = ~np.isnan(joined.targets.ends_BT)
    return jax.tree.map(lambda x: x[known], joined)


class _Clip(NamedTuple):
    number: int
    start: int


def _ends(episodes: Episodes, number: int) -> bool:
    outcomes = episodes[number].outcomes
    return outcomes is not None and bool(outcomes.done[-1])


def _seen(network, params, episodes: Episodes, clips: Sequence[_Clip], seed: int) -> Seen:
    filled = list(clips) + [clips[-1]] * (_CLIPS_AT_ONCE - len(clips))
    batch = cut(episodes, [(c.number, c.start) for c in filled], network.max_frames)
    if network.has_coinrun_actions:
        batch = jax.tree.map(np.asarray, mirrored(random_numbers.key(seed), batch, 0.5))
    tokens = np.asarray(_tokens(params, batch["frames"], batch["actions"], network=network))
    past = network.max_frames // 3
    kept = lambda x: x[: len(clips), past:].reshape(-1, *x.shape[2:])
    targets = Targets(*(kept(batch[key]) for key in ("pressed", "rewards", "ends")))
    return Seen(kept(tokens), targets)


@functools.partial(jax.jit, static_argnames="network")
def _tokens(params, frames_BTHWC, actions_BT, *, network: DiTConfig) -> jax.Array:
    denoiser = bind(network, params)
    level = SamplerConfig.context_level
    stream = denoiser.context_stream(to_model(frames_BTHWC), actions_BT, level)
    return heads.normed(add(*stream)).astype(jnp.float16)


def fit(
    network: DiTConfig, params: Params, seen: Seen, *, epochs: int, seed: int, watched: bool = False
) -> Params:
    """The parameters with heads fitted to `seen`; all others are as they were.

    `network` has heads; those in `params` are where they begin, else they are fresh.
    """
    params = dit.with_heads(network, params, seed)
    own = {name: p for name, p in params.items() if name.startswith(heads.PREFIX)}
    rest = {name: p for name, p in params.items() if name not in own}
    batch = min(_BATCH, len(seen))
    steps = max(1, epochs * (len(seen) // batch))
    state = _optimizer(steps).init(own)
    rng, order = np.random.default_rng(seed), np.zeros(0, int)
    exact = dataclasses.replace(network, dtype="float32")
    for _ in tqdm(range(steps), "fitting heads", unit=" updates", disable=not watched):
        if len(order) < batch:
            order = rng.permutation(len(seen))
        rows, order = order[:batch], order[batch:]
        part = jax.tree.map(lambda x, rows=rows: x[rows], seen)
        own, state = _learn(own, state, part, network=exact, steps=steps)
    return rest | own


@functools.lru_cache
def _optimizer(steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(_RATE, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=_DECAY))


@functools.partial(jax.jit, static_argnames=("network", "steps"), donate_argnums=(0, 1))
def _learn(own: Params, state, seen: Seen, *, network: DiTConfig, steps: int):
    def loss(own: Params):
        bound = heads.bind(network, own)
        scene = bound.scene_of_normed(seen.tokens_NSD.astype(jnp.float32)[None])
        pressed = dit.action_vectors(network, seen.targets.pressed_BT[None])
        targets = jax.tree.map(lambda x: x[None], seen.targets)
        weights = jnp.ones_like(targets.ends_BT)
        return objective.outcome_loss(bound(scene, pressed), targets, weights)

    updates, state = _optimizer(steps).update(jax.grad(loss)(own), state, own)
    return optax.apply_updates(own, updates), state


def shifted(params: Params, *, end: float, reward: float) -> Params:
    """Heads that say 0.5 where they said the probabilities `end` and `reward` (of a positive one).

    Frames near the ends of episodes are learned from more often than they occur, so the
    probabilities mean nothing by themselves.
    """
    odds = lambda p: np.log(p / (1 - p)).astype(np.float32)
    ends, rewards = heads.PREFIX + "end_out.bias", heads.PREFIX + "reward_out.bias"
    positive = np.array([0, 0, odds(reward)])
    return params | {ends: params[ends] - odds(end), rewards: params[rewards] - positive}
