"""The device's side of play: the few compiled programs that all players share.

A player's frame is drawn in a batch of 1, 2, 4 or 8 lanes, one lane a player. What a lane draws
depends on how many lanes there are (the order of floating-point sums does) but not on who is in
the others, so a session that notes the number of lanes of each frame can be drawn again exactly.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.diffusion.denoiser import bind
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.play.inference import staggered_cache
from cwm_jax.play.inference.staggered_cache import Memory
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import kv_cache, sampler
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels

LANES = (1, 2, 4, 8)
_STATIC = ("network", "config")


class Program(NamedTuple):
    """How a frame was drawn: with so many DDIM steps, in a batch of so many lanes."""

    steps: int
    lanes: int


class Lane(NamedTuple):
    """One frame to draw."""

    memory: Memory
    action: int
    seed: int  # 0…2³² − 1; with `number` it makes the frame's noise
    number: int  # of the frame in its session


@functools.partial(jax.jit, static_argnames=_STATIC)
def _tabulate(params, *, network, config):
    return sampler.tabulate(bind(network, params), config)


def _draw(params, tables, memories_L, actions_L, seeds_L, numbers_L, *, network, config):
    bound = bind(network, params)
    worlds_L = jax.tree.map(lambda *x: jnp.stack(x), *(m.in_use() for m in memories_L))

    def lane(state, action, seed, number):
        key = jax.random.fold_in(random_numbers.key(seed), number)
        noise, step_key = sampler.frame_noise(key, state.frames_BMHWC[:, 0].shape)
        frame_BHWC = sampler.draw_frame(bound, tables, state, action[None], noise, step_key, config)
        return sampler.to_pixels(frame_BHWC[0])

    return jax.vmap(lane)(worlds_L, actions_L, seeds_L, numbers_L)


def _unsure(params, tables, memory, action, seed, number, *, network, config):
    """How unstable the denoising of the next frame is, float32 [h, w]."""
    world = memory.in_use()
    key = jax.random.fold_in(random_numbers.key(seed), number)
    noise, step_key = sampler.frame_noise(key, world.frames_BMHWC[:, 0].shape)
    args = bind(network, params), tables, world, action[None], noise, step_key, config
    return sampler.draw_watched_frame(*args)[1][0]


def _remember(params, context, memory, frame_u8_HWC, action, *, network):
    return staggered_cache.remember(bind(network, params), context, memory, frame_u8_HWC, action)


class Engine:
    """A trained network that draws players' frames.

    Programs are compiled by `compile` alone, never by a call that a player waits for.

    Args:
        steps: numbers of DDIM steps that can be asked for.
        usual: the steps that the network does best with: more are drawn only where asked for.
        playable: the steps that the model's card lists; None where it has no card. Where `steps`
            has none of them, the one nearest to `usual` is added.
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
        self._tables = {n: _tabulate(params, network=network, config=c) for n, c in configs.items()}
        self._context = self._tables[self.steps[0]].context
        self._fresh = staggered_cache.fresh(self._world_like())
        self._draw_programs: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._remember_program = None
        self._unsure_programs: dict[int, tuple[jax.stages.Compiled, sampler.Tables]] = {}

    @property
    def slots(self) -> int:
        """Frames that a memory holds at most."""
        return self.network.max_frames - 1

    def ready(self, steps: int) -> tuple[int, ...]:
        """The numbers of lanes that are compiled for so many steps, rising."""
        return tuple(sorted(lanes for n, lanes in list(self._draw_programs) if n == steps))

    def compile(self, steps: int, lanes: int) -> None:
        """Compiles the program for so many steps and lanes, unless it is there already."""
        if self._remember_program is None:
            frame = np.zeros(self._frame_shape, np.uint8)
            program = jax.jit(_remember, static_argnames="network", donate_argnames="memory")
            self._remember_program = program.lower(
                self._params, self._context, self._fresh, frame, np.int32(0), network=self.network
            ).compile()
        if (steps, lanes) not in self._draw_programs:
            program = jax.jit(_draw, static_argnames=_STATIC)
            blank = Lane(self._fresh, 0, 0, 0)
            args = self._arguments([blank] * lanes, steps, lanes)
            static = dict(network=self.network, config=self._configs[steps])
            self._draw_programs[steps, lanes] = program.lower(*args, **static).compile()

    def compile_unsure(self, steps: int) -> None:
        """Compiles what `unsure` needs for so many steps, unless it is there already."""
        if steps not in self._unsure_programs:
            config = SamplerConfig(levels=ddim_levels(max(steps, 2)), window="cached")
            static = dict(network=self.network, config=config)
            tables = _tabulate(self._params, **static)
            args = self._unsure_arguments(tables, Lane(self._fresh, 0, 0, 0))
            program = jax.jit(_unsure, static_argnames=_STATIC).lower(*args, **static).compile()
            self._unsure_programs[steps] = program, tables

    def unsure(self, wanted: Lane, steps: int) -> np.ndarray | None:
        """How far the prediction of a lane's next frame moves between denoising steps (two, where
        it has one), float32 [h, w]: see `sampler.draw_watched_frame`. None where it is not
        compiled. It costs as much as the frame; the memory is not used up.
        """
        if steps not in self._unsure_programs:
            return None
        program, tables = self._unsure_programs[steps]
        return np.asarray(program(*self._unsure_arguments(tables, wanted)))

    def _unsure_arguments(self, tables, wanted: Lane) -> tuple:
        numbers = np.int32(wanted.action), np.uint32(wanted.seed), np.int32(wanted.number)
        return self._params, tables, wanted.memory, *numbers

    def fresh(self) -> Memory:
        """A memory of nothing, the caller's own."""
        return jax.tree.map(jnp.copy, self._fresh)

    def remember(self, memory: Memory, frame_u8_HWC: np.ndarray, action: int) -> Memory:
        """The memory after one more frame; the old one is used up (its buffers are reused)."""
        args = memory, np.ascontiguousarray(frame_u8_HWC), np.int32(action)
        return self._remember_program(self._params, self._context, *args)

    def draw(self, wanted: Sequence[Lane], steps: int, lanes: int) -> np.ndarray:
        """The next frame of each lane, uint8 [len(wanted), H, W, C]; waits for the device."""
        program = self._draw_programs[steps, lanes]
        return np.asarray(program(*self._arguments(wanted, steps, lanes)))[: len(wanted)]

    def _arguments(self, wanted: Sequence[Lane], steps: int, lanes: int) -> tuple:
        filled = [*wanted, *[wanted[0]] * (lanes - len(wanted))]
        memories_L, actions, seeds, numbers = zip(*filled, strict=True)
        return (
            self._params,
            self._tables[steps],
            memories_L,
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
    """The steps that are chosen where no player does: at most `usual`, and of a card's own only.

    Fewer than the least of these, not on the card, are left for a machine that is far too slow.
    """
    listed = [n for n in steps if playable is None or n in playable]
    best = {n for n in listed if n <= usual} or {min(listed)}
    return tuple(n for n in steps if n in best or (playable is not None and n < min(best)))


def fingerprint(network: DiTConfig, params: Params) -> bytes:
    """8 bytes that tell one trained network from another."""
    digest = hashlib.blake2b(repr(network).encode(), digest_size=8)
    if network.warp_sharpness != 1:
        digest.update(f"warp_sharpness={network.warp_sharpness}".encode())
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.digest()
