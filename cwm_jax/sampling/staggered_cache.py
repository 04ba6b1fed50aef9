"""What one world remembers: a function of its frames and actions, and of nothing else.

Play wants each frame at the same cost, every window to be one that training has seen, and a way
back to any earlier frame that costs no memory. So a player has two temporal caches, staggered by
half a window. The next frame looks back on the older; both take in each frame that is drawn; when
the older is full, the younger takes its place and begins anew. This is the window mode "hop" of
`cwm_jax.sampling.kv_cache` without its hiccup at each hop.

Frames enter as the uint8 pixels that the player saw, each by one pass of one compiled program. A
memory that is rebuilt from a recorded session (at most one window of passes, however old the
session) is therefore the very one it had, bit for bit.
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
class Memory:
    """Two worlds of one player (leading axis 2), each with a batch of one."""

    worlds: World
    old: jax.Array  # int32 [], the one of the two that the next frame looks back on

    @property
    def slots(self) -> int:
        return self.worlds.actions_BM.shape[-1]

    def in_use(self) -> World:
        return jax.tree.map(lambda x: x[self.old], self.worlds)


def stride(slots: int) -> int:
    """Frames from one change of caches to the next."""
    return slots // 2 + 1


def first_remembered(frames: int, slots: int) -> int:
    """The number of the oldest frame still in use when a session has so many frames."""
    overflow = max(0, frames - slots)
    return -(-overflow // stride(slots)) * stride(slots)


def fresh(like: World) -> Memory:
    """A memory of nothing; `like` gives the shapes of a world with a batch of one."""
    zeros = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), like)
    return Memory(zeros, jnp.zeros((), jnp.int32))


def remember(
    denoiser: Denoiser, context: Modulations, memory: Memory, frame_u8_HWC, action
) -> Memory:
    """The memory after one more frame, uint8 [H, W, C], and the action that led into it."""
    return _remember(denoiser, context, memory, frame_u8_HWC, action, lambda stream: None)[0]


def remember_with_scene(
    denoiser: Denoiser, context: Modulations, memory: Memory, frame_u8_HWC, action
) -> tuple[Memory, jax.Array]:
    """As `remember`; also what the network's heads keep of the frame, [256]."""
    scene_of = denoiser.net.scene
    return _remember(denoiser, context, memory, frame_u8_HWC, action, scene_of)


def _remember(denoiser, context, memory: Memory, frame_u8_HWC, action, look):
    """The memory after one more frame, and what `look` finds in its stream."""
    worlds, slots = memory.worlds, memory.slots
    full = worlds.count[memory.old] == slots
    old = jnp.where(full, 1 - memory.old, memory.old)
    # A world whose count is 0 has forgotten all: no slot is visible, and each is overwritten.
    count = worlds.count.at[1 - old].multiply(jnp.where(full, 0, 1))
    takes_part = count[old] >= stride(slots)
    frame_BHWC, action_B = to_model(frame_u8_HWC)[None], action[None]

    def take_in(one: World):
        older, stream = kv_cache.append(denoiser, context, one, frame_BHWC, action_B)
        return older, look(stream)

    after, seen = jax.vmap(take_in)(dataclasses.replace(worlds, count=count))
    count = after.count.at[1 - old].multiply(jnp.where(takes_part, 1, 0))
    found = jax.tree.map(lambda x: x[old, 0, 0], seen)
    return Memory(dataclasses.replace(after, count=count), old), found
