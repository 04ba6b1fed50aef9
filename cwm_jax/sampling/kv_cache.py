"""A world in progress: the last frames, the actions that led into them, and the temporal cache.

A context frame's inputs never change while later frames are drawn (clean pixels, one fixed noise
label, its action), and temporal attention is causal. So its keys and values are constants, as long
as the frames that it looked back on are still in the window. What to do once the window slides is
the `window` mode:

    exact   encode the whole window anew for each frame: the reference's result at every length
    cached  keep the old keys and values: constant cost, but they remember frames that have left
    hop     keep them until the window is full, then drop its older half and encode the rest anew:
            every window is one that training has seen

Memory is a ring of M = max_frames − 1 slots; frame j lives in slot j mod M. Keys are stored before
rotation, so a frame's place in time may change while its slot does not.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.diffusion.denoiser import Denoiser
from cwm_jax.models import rope
from cwm_jax.models.dit import FrameKV, Modulations, Past, Stream

Window = Literal["exact", "cached", "hop"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class World:
    """State of B worlds that are equally old."""

    frames_BMHWC: jax.Array  # float32, clean pixels, [-1, 1] for a prompt, unclamped if drawn
    actions_BM: jax.Array  # int32, the action that led into each of these frames, −1 for none
    kv: FrameKV  # [B, S, N, M, K] in the compute dtype, one pair for each block
    first: jax.Array  # int32 [], number of the oldest frame that is still seen
    count: jax.Array  # int32 [], frames so far, the prompt's included

    @property
    def slots(self) -> int:
        return self.actions_BM.shape[1]


def start(denoiser: Denoiser, context: Modulations, frames_BMHWC, actions_BM, count) -> World:
    """A world whose first `count` frames (1…M) are given; later slots hold padding."""
    kv = _encode(denoiser, context, frames_BMHWC, actions_BM)
    zero = jnp.zeros((), jnp.int32)
    return World(frames_BMHWC, actions_BM, kv, first=zero, count=jnp.asarray(count, jnp.int32))


def past(denoiser: Denoiser, world: World) -> Past:
    """What the next frame looks back on, keys rotated to their present places in time."""
    newest = world.count - 1
    frame_M = newest - (newest - jnp.arange(world.slots)) % world.slots  # which frame a slot holds
    angles_MK = rope.temporal_angles(frame_M - world.first, denoiser.config.head_size)
    keys = tuple(rope.rotate(k, angles_MK) for k in world.kv.keys)
    return Past(
        FrameKV(keys, world.kv.values),
        visible_BM=(frame_M >= world.first)[None],
        position_B=(world.count - world.first)[None],
    )


def earlier(denoiser: Denoiser, world: World) -> jax.Array | None:
    """The frames before the next one, newest first: [B, H, W, 3 · history], or None without."""
    if not denoiser.config.history:
        return None
    frame_H = jnp.maximum(world.count - 1 - np.arange(denoiser.config.history), world.first)
    return jnp.concatenate([world.frames_BMHWC[:, j % world.slots] for j in frame_H], axis=-1)


def advance(
    denoiser: Denoiser, context: Modulations, world: World, frame_BHWC, action_B, window: Window
):
    """The world one frame older: the frame and its action enter the ring, then the cache follows.

    `context` holds the modulations of a clean frame for each action, [A + 1, ...]; −1 is the last.
    """
    older = _entered(world, frame_BHWC, action_B)
    append = lambda: _append(denoiser, context, world, older, frame_BHWC, action_B)[0]
    if window == "cached":
        return append()
    full = world.count - world.first == world.slots
    keep = world.slots if window == "exact" else (world.slots + 1) // 2
    return jax.lax.cond(full, lambda: _reencode(denoiser, context, older, keep), append)


def append(
    denoiser: Denoiser, context: Modulations, world: World, frame_BHWC, action_B
) -> tuple[World, Stream]:
    """As `advance` in the mode "cached"; also the stream of the new frame, [B, 1, S, D]."""
    older = _entered(world, frame_BHWC, action_B)
    return _append(denoiser, context, world, older, frame_BHWC, action_B)


def _entered(world: World, frame_BHWC, action_B) -> World:
    slot = world.count % world.slots
    return dataclasses.replace(
        world,
        frames_BMHWC=world.frames_BMHWC.at[:, slot].set(frame_BHWC),
        actions_BM=world.actions_BM.at[:, slot].set(action_B),
    )


def _append(denoiser, context, world, older, frame_BHWC, action_B) -> tuple[World, Stream]:
    """One pass over the new frame alone; where the ring is full its oldest frame makes room."""
    modulations = jax.tree.map(lambda table: table[action_B][:, None], context)
    tokens = _tokens(denoiser, frame_BHWC[:, None], _earlier_or_itself(denoiser, world, frame_BHWC))
    stream, new = denoiser.net.frame(tokens, modulations, past(denoiser, world))
    slot = world.count % world.slots
    kv = jax.tree.map(lambda ring, kv: ring.at[:, :, :, slot].set(kv), world.kv, new)
    count = world.count + 1
    first = jnp.maximum(world.first, count - world.slots)
    return dataclasses.replace(older, kv=kv, first=first, count=count), stream


def _reencode(denoiser, context, older: World, keep: int) -> World:
    """One pass over the newest `keep` frames, which then are all that is seen."""
    count = older.count + 1
    first = count - keep
    slots_T = (first + jnp.arange(keep)) % older.slots
    kv = _encode(denoiser, context, older.frames_BMHWC[:, slots_T], older.actions_BM[:, slots_T])
    pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, older.slots - keep), (0, 0)])
    kv = jax.tree.map(lambda x: jnp.roll(pad(x), first % older.slots, axis=3), kv)
    return dataclasses.replace(older, kv=kv, first=first, count=count)


def _encode(denoiser: Denoiser, context: Modulations, frames_BTHWC, actions_BT) -> FrameKV:
    """Keys and values of clean frames at places 0 … T−1, each [B, S, N, T, K]."""
    modulations = jax.tree.map(lambda table: table[actions_BT], context)
    tokens = _tokens(denoiser, frames_BTHWC, denoiser.earlier(frames_BTHWC))
    _, kv = denoiser.net.clip(tokens, modulations)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 3), kv)


def _tokens(denoiser: Denoiser, frames_BTHWC, earlier_BTHWC) -> jax.Array:
    return denoiser.net.tokens(denoiser.to_sample(frames_BTHWC, earlier_BTHWC), earlier_BTHWC)


def _earlier_or_itself(denoiser: Denoiser, world: World, frame_BHWC) -> jax.Array | None:
    """`earlier` of a frame about to enter, [B, 1, ...]; a world's very first frame repeated."""
    if not denoiser.config.history:
        return None
    itself = jnp.concatenate([frame_BHWC] * denoiser.config.history, axis=-1)
    return jnp.where(world.count == 0, itself, earlier(denoiser, world))[:, None]
