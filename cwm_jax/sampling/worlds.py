"""Many worlds in one compiled step, each of its own age.

`cwm_jax.sampling.sampler` generates worlds that are equally old. Here each world has a cache of
its own (`cwm_jax.sampling.staggered_cache`), so one of them can begin again while the others go
on, and every step costs the same. What a world generates depends on its prompt, its seed, its
actions, and the number of worlds beside it (through the order of floating-point sums), but not on
what the others do.

Of a network with heads (`cwm_jax.models.heads`) each step also predicts what its actions earned and
whether they ended the episode; the world goes on all the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.coinrun import to_pixels
from cwm_jax.diffusion.denoiser import Denoiser, bind
from cwm_jax.errors import UserError
from cwm_jax.models import heads
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import kv_cache, prompt, sampler, staggered_cache
from cwm_jax.sampling.sampler import SamplerConfig, Tables
from cwm_jax.sampling.staggered_cache import StaggeredCache


class Worlds(NamedTuple):
    """State of B worlds."""

    cache_B: StaggeredCache  # every array with a leading axis B
    frame_BHWC: jax.Array  # uint8, the newest frame of each
    seed_B: jax.Array  # uint32, with `count_B` it makes the noise of the next frame
    count_B: jax.Array  # int32, frames so far, the prompt's included
    scene_BH: jax.Array | None = None  # what the heads keep of the newest frames; None without


class Outcomes(NamedTuple):
    """Probabilities of what an action led to, float32 [B] (or [B, F])."""

    negative: jax.Array  # its reward is negative
    positive: jax.Array  # its reward is positive
    end: jax.Array  # the episode ends with it


def begin(denoiser: Denoiser, tables: Tables, prompt_frames, prompt_actions, count, seed_B):
    """B worlds after the first `count` (1…M) of M given frames, uint8 [B, M, H, W, C]."""
    like = jax.eval_shape(
        lambda frames, actions: kv_cache.start(denoiser, tables.context, frames, actions, 1),
        jax.ShapeDtypeStruct((1, *prompt_frames.shape[1:]), jnp.float32),
        jax.ShapeDtypeStruct((1, prompt_actions.shape[1]), jnp.int32),
    )

    append = _append(denoiser, tables)
    scene = jnp.zeros(heads.WIDTH) if denoiser.config.heads else None
    fresh = staggered_cache.fresh(like), scene

    def one_world(frames_MHWC, actions_M):
        take_in = lambda i, state: append(state[0], frames_MHWC[i], actions_M[i])
        return jax.lax.fori_loop(0, count, take_in, fresh)

    cache_B, scene_BH = jax.vmap(one_world)(prompt_frames, prompt_actions)
    count_B = jnp.full_like(seed_B, count, "int32")
    return Worlds(cache_B, prompt_frames[:, count - 1], seed_B, count_B, scene_BH)


def _append(denoiser: Denoiser, tables: Tables):
    """(cache, frame, action) → (cache, what the heads keep of the frame; None without heads)."""
    if denoiser.config.heads:
        return functools.partial(staggered_cache.append_with_scene, denoiser, tables.context)
    return lambda *args: (staggered_cache.append(denoiser, tables.context, *args), None)


def outcomes(denoiser: Denoiser, worlds: Worlds, action_B) -> Outcomes | None:
    """What these actions lead to, as the heads tell; None for a network without."""
    if not denoiser.config.heads:
        return None
    predicted = denoiser.net.outcomes(worlds.scene_BH[:, None], action_B[:, None])
    signs = jax.nn.softmax(predicted.reward[:, 0])
    return Outcomes(signs[:, 0], signs[:, 2], jax.nn.sigmoid(predicted.end[:, 0]))


def step(denoiser: Denoiser, tables: Tables, worlds: Worlds, action_B, config: SamplerConfig):
    """The worlds one frame older; the new frames are their `frame_BHWC`."""

    def one_world(cache, seed, count, action):
        world = cache.in_use()
        key = jax.random.fold_in(random_numbers.key(seed), count)
        noise, step_key = sampler.frame_noise(key, world.frames_BMHWC[:, 0].shape)
        frame = sampler.generate_frame(
            denoiser, tables, world, action[None], noise, step_key, config
        )
        pixels = to_pixels(frame[0])
        return append(cache, pixels, action), pixels

    append = _append(denoiser, tables)
    (cache_B, scene_BH), frame_BHWC = jax.vmap(one_world)(
        worlds.cache_B, worlds.seed_B, worlds.count_B, action_B
    )
    return Worlds(cache_B, frame_BHWC, worlds.seed_B, worlds.count_B + 1, scene_BH)


def chosen(where_B, these: Worlds, others: Worlds) -> Worlds:
    """World by world: `these` where `where_B` holds, else `others`."""
    pick = lambda a, b: jnp.where(where_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, these, others)


_STATIC = ("network", "config")


@functools.partial(jax.jit, static_argnames="network")
def _begin(params, tables, frames, actions, count, seed_B, *, network):
    return begin(bind(network, params), tables, frames, actions, count, seed_B)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="worlds")
def _rollout(params, tables, worlds, actions_BF, *, network, config):
    denoiser = bind(network, params)

    def one_frame(worlds, action_B):
        predicted = outcomes(denoiser, worlds, action_B)
        worlds = step(denoiser, tables, worlds, action_B, config)
        return worlds, (worlds.frame_BHWC, predicted)

    worlds, found = jax.lax.scan(one_frame, worlds, actions_BF.T)
    return worlds, *jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


_chosen = jax.jit(chosen)


class WorldGenerator:
    """A trained network that generates the frames of such worlds.

    Prompts of every length share one compiled program, and so do worlds of every age; only
    another number of worlds, or of frames in one call, compiles anew.

    Args:
        network, params: as `cwm_jax.checkpoints.formats.load` returns them.
        config: `levels` and `context_level` are used; the window is always that of
            `staggered_cache`.
    """

    def __init__(self, network: DiTConfig, params: Params, config: SamplerConfig):
        if network.max_frames < 2:
            raise UserError(f"max_frames={network.max_frames}: a world needs a window of 2 or more")
        self.network, self.config = network, config
        self._static = dict(network=network, config=config)
        self._tables = sampler.tables(params, **self._static)
        self._params = jax.tree.map(lambda x: x.astype(network.compute_dtype), params)

    def begin(self, frames_BPHWC, actions_BP, seeds) -> Worlds:
        """B worlds after their prompts, 1 ≤ P ≤ `max_frames` frames each.

        Args:
            frames_BPHWC: uint8.
            actions_BP: the action that led into each frame; the first may be −1 (none).
            seeds: B whole numbers 0…2³² − 1, of the noise of all frames to come.

        Raises:
            UserError: for a prompt or a seed that cannot be, naming the value.
        """
        frames, actions, count = prompt.padded(self.network, frames_BPHWC, actions_BP)
        for seed in seeds:
            sampler.check_seed(seed)
        args = self._params, self._tables, frames, actions, count, np.array(seeds, np.uint32)
        return _begin(*args, network=self.network)

    def rollout(self, worlds: Worlds, actions_BF) -> tuple[Worlds, jax.Array, Outcomes | None]:
        """Generates one frame for each action: (the older worlds, uint8 [B, F, H, W, C], outcomes).

        The outcomes, [B, F] each, are what the actions led to; None for a network without heads.

        `worlds` is used up (its arrays become the new worlds').

        Raises:
            UserError: for an action outside 0…A − 1, or a wrong number of worlds.
        """
        actions_BF = prompt.next_actions(self.network, actions_BF, len(worlds.count_B))
        return _rollout(self._params, self._tables, worlds, actions_BF, **self._static)

    def replaced(self, where_B, new: Worlds, worlds: Worlds) -> Worlds:
        """`worlds`, of which those at `where_B` (bool [B]) are the `new` ones."""
        return _chosen(np.asarray(where_B), new, worlds)
