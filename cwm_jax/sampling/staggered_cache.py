"""The KV cache of one world: a function of its frames and actions alone.

Play needs the same cost for each frame, only windows as in training, and rewinding to any earlier
frame without stored caches. So a player has two KV caches, staggered by half a window. The next
frame attends to the older one; each frame is appended to both; when the older one is full, the
newer one replaces it, and a new one starts. This is the window mode "hop" of
`cwm_jax.sampling.kv_cache` without its delay at each hop.

Frames are appended as uint8 pixels, as the player saw them, one by one with one compiled program.
So a cache that is rebuilt from a recorded session (from at most one window of frames) is equal bit
for bit.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion.denoiser import Denoiser
from cwm_jax.models.dit import Modulations
from cwm_jax.sampling import kv_cache
from cwm_jax.sampling.kv_cache import World


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaggeredCache:
    """Two worlds of one player (leading axis 2), each with a batch of one."""

    worlds: World
    old: jax.Array  # int32 [], the index of the one that the next frame attends to

    @property
    def slots(self) -> int:
        return self.worlds.actions_BM.shape[-1]

    def in_use(self) -> World:
        return jax.tree.map(lambda x: x[self.old], self.worlds)


def stride(slots: int) -> int:
    """Frames between two replacements of the older cache."""
    return slots // 2 + 1


def first_cached(frames: int, slots: int) -> int:
    """The number of the oldest frame still in use when a session has so many frames."""
    overflow = max(0, frames - slots)
    return -(-overflow // stride(slots)) * stride(slots)


def fresh(like: World) -> StaggeredCache:
    """An empty cache; `like` gives the shapes of a world with a batch of one."""
    zeros = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), like)
    return StaggeredCache(zeros, jnp.zeros((), jnp.int32))


def append(
    denoiser: Denoiser, context: Modulations, cache: StaggeredCache, frame_u8_HWC, action
) -> StaggeredCache:
    """The cache after one more frame, uint8 [H, W, C], and the action that led into it."""
    return _append(denoiser, context, cache, frame_u8_HWC, action, lambda stream: None)[0]


def append_with_scene(
    denoiser: Denoiser, context: Modulations, cache: StaggeredCache, frame_u8_HWC, action
) -> tuple[StaggeredCache, jax.Array]:
    """As `append`; also what the network's heads keep of the frame, [256]."""
    scene_of = denoiser.net.scene
    return _append(denoiser, context, cache, frame_u8_HWC, action, scene_of)


def _append(denoiser, context, cache: StaggeredCache, frame_u8_HWC, action, look):
    """The cache after one more frame, and what `look` makes of the frame's stream."""
    worlds, slots = cache.worlds, cache.slots
    full = worlds.count[cache.old] == slots
    old = jnp.where(full, 1 - cache.old, cache.old)
    # A world with count 0 is empty: no slot is visible, and each is overwritten.
    count = worlds.count.at[1 - old].multiply(jnp.where(full, 0, 1))
    takes_part = count[old] >= stride(slots)
    frame_BHWC, action_B = to_model(frame_u8_HWC)[None], action[None]

    def append_to(one: World):
        following, stream = kv_cache.append(denoiser, context, one, frame_BHWC, action_B)
        return following, look(stream)

    after, seen = jax.vmap(append_to)(dataclasses.replace(worlds, count=count))
    count = after.count.at[1 - old].multiply(jnp.where(takes_part, 1, 0))
    found = jax.tree.map(lambda x: x[old, 0, 0], seen)
    return StaggeredCache(dataclasses.replace(after, count=count), old), found
