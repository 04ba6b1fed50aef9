"""State of a rollout: the last frames, the actions that led into them, and the KV cache.

A context frame's inputs are constant while later frames are generated (clean pixels, one fixed
noise level, its action), and temporal attention is causal. So its keys and values are constant as
long as the frames that it attended to are still in the window. The `window` mode decides what
happens when the window slides:

    exact   encode the whole window again for each frame: the reference's result at every length
    cached  keep the old keys and values: constant cost, but they depend on frames that have left
    hop     keep them until the window is full, then drop its older half and encode the rest again:
            every window is as in training

The cache is a ring buffer of M = max_frames − 1 slots; frame j is in slot j mod M. Keys are stored
before rotation, so a frame's position may change while its slot does not.
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
    """State of B worlds with the same number of frames."""

    frames_BMHWC: jax.Array  # float32, clean pixels, [-1, 1] for a prompt, unclamped if generated
    actions_BM: jax.Array  # int32, the action that led into each of these frames, −1 for none
    kv: FrameKV  # [B, S, N, M, K] in the compute dtype, one pair for each block
    first: jax.Array  # int32 [], number of the oldest visible frame
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
    """The keys and values that the next frame attends to, keys rotated to their positions."""
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
    """The world after one more frame: stores the frame and its action, and updates the cache.

    `context` holds the modulations of a clean frame for each action, [A + 1, ...]; −1 is the last.
    """
    following = _entered(world, frame_BHWC, action_B)
    append = lambda: _append(denoiser, context, world, following, frame_BHWC, action_B)[0]
    if window == "cached":
        return append()
    full = world.count - world.first == world.slots
    keep = world.slots if window == "exact" else (world.slots + 1) // 2
    return jax.lax.cond(full, lambda: _reencode(denoiser, context, following, keep), append)


def append(
    denoiser: Denoiser, context: Modulations, world: World, frame_BHWC, action_B
) -> tuple[World, Stream]:
    """As `advance` in the mode "cached"; also the stream of the new frame, [B, 1, S, D]."""
    following = _entered(world, frame_BHWC, action_B)
    return _append(denoiser, context, world, following, frame_BHWC, action_B)


def _entered(world: World, frame_BHWC, action_B) -> World:
    """The world with a frame in its ring buffer that is not encoded yet."""
    slot = world.count % world.slots
    return dataclasses.replace(
        world,
        frames_BMHWC=world.frames_BMHWC.at[:, slot].set(frame_BHWC),
        actions_BM=world.actions_BM.at[:, slot].set(action_B),
    )


def _append(denoiser, context, world, following, frame_BHWC, action_B) -> tuple[World, Stream]:
    """Encodes the new frame alone; in a full ring buffer it replaces the oldest frame."""
    modulations = jax.tree.map(lambda table: table[action_B][:, None], context)
    tokens = _tokens(denoiser, frame_BHWC[:, None], _earlier_or_itself(denoiser, world, frame_BHWC))
    stream, new = denoiser.net.frame(tokens, modulations, past(denoiser, world))
    slot = world.count % world.slots
    kv = jax.tree.map(lambda ring, kv: ring.at[:, :, :, slot].set(kv), world.kv, new)
    count = world.count + 1
    first = jnp.maximum(world.first, count - world.slots)
    return dataclasses.replace(following, kv=kv, first=first, count=count), stream


def _reencode(denoiser, context, following: World, keep: int) -> World:
    """Encodes the newest `keep` frames again; only they are visible then."""
    count = following.count + 1
    first = count - keep
    slots_T = (first + jnp.arange(keep)) % following.slots
    kv = _encode(
        denoiser, context, following.frames_BMHWC[:, slots_T], following.actions_BM[:, slots_T]
    )
    pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, following.slots - keep), (0, 0)])
    kv = jax.tree.map(lambda x: jnp.roll(pad(x), first % following.slots, axis=3), kv)
    return dataclasses.replace(following, kv=kv, first=first, count=count)


def _encode(denoiser: Denoiser, context: Modulations, frames_BTHWC, actions_BT) -> FrameKV:
    """Keys and values of clean frames at positions 0 … T−1, each [B, S, N, T, K]."""
    modulations = jax.tree.map(lambda table: table[actions_BT], context)
    tokens = _tokens(denoiser, frames_BTHWC, denoiser.earlier(frames_BTHWC))
    _, kv = denoiser.net.clip(tokens, modulations)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 3), kv)


def _tokens(denoiser: Denoiser, frames_BTHWC, earlier_BTHWC) -> jax.Array:
    return denoiser.net.tokens(denoiser.to_sample(frames_BTHWC, earlier_BTHWC), earlier_BTHWC)


def _earlier_or_itself(denoiser: Denoiser, world: World, frame_BHWC) -> jax.Array | None:
    """`earlier` of a new frame, [B, 1, ...]; a world's first frame is repeated instead."""
    if not denoiser.config.history:
        return None
    itself = jnp.concatenate([frame_BHWC] * denoiser.config.history, axis=-1)
    return jnp.where(world.count == 0, itself, earlier(denoiser, world))[:, None]
