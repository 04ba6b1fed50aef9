"""Inference for play: the compiled programs that all players share.

A player's frame is generated in a batch of 1, 2, 4 or 8 lanes, one lane per player. The result in a
lane depends on the number of lanes (as does the order of floating-point sums) but not on the
contents of the others, so a session that records the number of lanes of each frame can be generated
again exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.diffusion.denoiser import bind
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import kv_cache, sampler, staggered_cache
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels
from cwm_jax.sampling.staggered_cache import StaggeredCache

LANES = (1, 2, 4, 8)
_STATIC = ("network", "config")


class Program(NamedTuple):
    """The DDIM steps and the number of lanes with which a frame was generated."""

    steps: int
    lanes: int


class Lane(NamedTuple):
    """One frame to generate."""

    cache: StaggeredCache
    action: int
    seed: int  # 0…2³² − 1; with `number` it determines the frame's noise
    number: int  # of the frame in its session


def _generate(params, tables, caches_L, actions_L, seeds_L, numbers_L, *, network, config):
    bound = bind(network, params)
    worlds_L = jax.tree.map(lambda *x: jnp.stack(x), *(m.in_use() for m in caches_L))

    def lane(state, action, seed, number):
        key = jax.random.fold_in(random_numbers.key(seed), number)
        noise, step_key = sampler.frame_noise(key, state.frames_BMHWC[:, 0].shape)
        frame_BHWC = sampler.generate_frame(
            bound, tables, state, action[None], noise, step_key, config
        )
        return sampler.to_pixels(frame_BHWC[0])

    return jax.vmap(lane)(worlds_L, actions_L, seeds_L, numbers_L)


def _unsure(params, tables, cache, action, seed, number, *, network, config):
    """How unstable the denoising of the next frame is, float32 [h, w]."""
    world = cache.in_use()
    key = jax.random.fold_in(random_numbers.key(seed), number)
    noise, step_key = sampler.frame_noise(key, world.frames_BMHWC[:, 0].shape)
    args = bind(network, params), tables, world, action[None], noise, step_key, config
    return sampler.generate_watched_frame(*args)[1][0]


def _append(params, context, cache, frame_u8_HWC, action, *, network):
    return staggered_cache.append(bind(network, params), context, cache, frame_u8_HWC, action)


class Engine:
    """A trained network that generates players' frames.

    Only `compile` compiles programs, never a call that a player waits for.

    Args:
        steps: available numbers of DDIM steps.
        usual: the best number of steps for the network; more are used only where a player chooses
            them.
        playable: the steps that the model's card lists; None without a card. Where `steps` has
            none of them, the one nearest to `usual` is added.
    """

    def __init__(
        self,
        network: DiTConfig,
        params: Params,
        *,
        steps: Sequence[int],
        usual: int = 1000,
        playable: Sequence[int] | None = None,
    ):
        if playable is not None and not set(steps) & set(playable):
            steps = (*steps, min(playable, key=lambda n: abs(n - usual)))
        self.network, self.steps = network, tuple(steps)
        self.playable = None if playable is None else tuple(playable)
        self.automatic = _automatic(self.steps, usual, self.playable)
        self.fingerprint = fingerprint(network, params)
        self._params = jax.tree.map(lambda x: x.astype(network.compute_dtype), params)
        levels = {n: ddim_levels(n) for n in self.steps}
        configs = {n: SamplerConfig(levels=levels[n], window="cached") for n in self.steps}
        self._configs = configs
        self._tables = {
            n: sampler.tables(params, network=network, config=c) for n, c in configs.items()
        }
        self._context = self._tables[self.steps[0]].context
        self._fresh = staggered_cache.fresh(self._world_like())
        self._generate_programs: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._append_program = None
        self._unsure_programs: dict[int, tuple[jax.stages.Compiled, sampler.Tables]] = {}

    @property
    def slots(self) -> int:
        """The largest number of frames in a cache."""
        return self.network.max_frames - 1

    def ready(self, steps: int) -> tuple[int, ...]:
        """The numbers of lanes that are compiled for so many steps, sorted."""
        return tuple(sorted(lanes for n, lanes in list(self._generate_programs) if n == steps))

    def compile(self, steps: int, lanes: int) -> None:
        """Compiles the program for so many steps and lanes, unless it is compiled already."""
        if self._append_program is None:
            frame = np.zeros(self._frame_shape, np.uint8)
            program = jax.jit(_append, static_argnames="network", donate_argnames="cache")
            self._append_program = program.lower(
                self._params, self._context, self._fresh, frame, np.int32(0), network=self.network
            ).compile()
        if (steps, lanes) not in self._generate_programs:
            program = jax.jit(_generate, static_argnames=_STATIC)
            blank = Lane(self._fresh, 0, 0, 0)
            args = self._arguments([blank] * lanes, steps, lanes)
            static = dict(network=self.network, config=self._configs[steps])
            self._generate_programs[steps, lanes] = program.lower(*args, **static).compile()

    def compile_unsure(self, steps: int) -> None:
        """Compiles what `unsure` needs for so many steps, unless it is compiled already."""
        if steps not in self._unsure_programs:
            config = SamplerConfig(levels=ddim_levels(max(steps, 2)), window="cached")
            static = dict(network=self.network, config=config)
            tables = sampler.tables(self._params, **static)
            args = self._unsure_arguments(tables, Lane(self._fresh, 0, 0, 0))
            program = jax.jit(_unsure, static_argnames=_STATIC).lower(*args, **static).compile()
            self._unsure_programs[steps] = program, tables

    def unsure(self, wanted: Lane, steps: int) -> np.ndarray | None:
        """How far the prediction of a lane's next frame moves between denoising steps (two, where
        it has one), float32 [h, w]: see `sampler.generate_watched_frame`. None where it is not
        compiled. It costs as much as the frame; the cache is not donated.
        """
        if steps not in self._unsure_programs:
            return None
        program, tables = self._unsure_programs[steps]
        return np.asarray(program(*self._unsure_arguments(tables, wanted)))

    def _unsure_arguments(self, tables, wanted: Lane) -> tuple:
        numbers = np.int32(wanted.action), np.uint32(wanted.seed), np.int32(wanted.number)
        return self._params, tables, wanted.cache, *numbers

    def fresh(self) -> StaggeredCache:
        """A new empty cache."""
        return jax.tree.map(jnp.copy, self._fresh)

    def append(
        self, cache: StaggeredCache, frame_u8_HWC: np.ndarray, action: int
    ) -> StaggeredCache:
        """The cache after one more frame; the old one is donated."""
        args = cache, np.ascontiguousarray(frame_u8_HWC), np.int32(action)
        return self._append_program(self._params, self._context, *args)

    def generate(self, wanted: Sequence[Lane], steps: int, lanes: int) -> np.ndarray:
        """The next frame of each lane, uint8 [len(wanted), H, W, C]; waits for the device."""
        program = self._generate_programs[steps, lanes]
        return np.asarray(program(*self._arguments(wanted, steps, lanes)))[: len(wanted)]

    def _arguments(self, wanted: Sequence[Lane], steps: int, lanes: int) -> tuple:
        filled = [*wanted, *[wanted[0]] * (lanes - len(wanted))]
        caches_L, actions, seeds, numbers = zip(*filled, strict=True)
        return (
            self._params,
            self._tables[steps],
            caches_L,
            np.array(actions, np.int32),
            np.array(seeds, np.uint32),
            np.array(numbers, np.int32),
        )

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        return (self.network.image_size, self.network.image_size, 3)

    def _world_like(self) -> kv_cache.World:
        frames = jnp.zeros((1, self.slots, *self._frame_shape), jnp.float32)
        actions = jnp.zeros((1, self.slots), jnp.int32)
        begin = lambda params, context: kv_cache.start(
            bind(self.network, params), context, frames, actions, 1
        )
        return jax.eval_shape(begin, self._params, self._context)


def _automatic(steps: Sequence[int], usual: int, playable: Sequence[int] | None) -> tuple[int, ...]:
    """The steps for automatic choice: at most `usual`, and only those on a card if there is one.

    Smaller numbers that are not on the card are included for machines that are far too slow.
    """
    listed = [n for n in steps if playable is None or n in playable]
    best = {n for n in listed if n <= usual} or {min(listed)}
    return tuple(n for n in steps if n in best or (playable is not None and n < min(best)))
