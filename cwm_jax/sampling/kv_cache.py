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

`advance` encodes each new frame at once, in a forward pass of its own. In a rollout `enter` leaves
that to `encode_newest`, which encodes the newest frame in the first denoising step of the next one,
as one pass of two frames.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.diffusion.denoiser import Denoiser
from cwm_jax.models import rope
from cwm_jax.models.dit import FrameKV, Modulations, Outputs, Past, Stream

Window = Literal["exact", "cached", "hop"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class World:
    """State of B worlds with the same number of frames.

    After `enter` the newest frame's keys and values are not in the cache yet.
    """

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
    frame_M = _held(world, world.count)
    return _past(denoiser, world, frame_M, world.count, [frame_M >= world.first])


def _held(world: World, number: jax.Array) -> jax.Array:
    """The frame that each slot holds before frame `number` is encoded, int32 [M]."""
    return number - 1 - (number - 1 - jnp.arange(world.slots)) % world.slots


def _past(denoiser: Denoiser, world: World, frame_M, number, visible_TM: list) -> Past:
    """What T new frames from `number` on attend to, in slots that hold the frames `frame_M`."""
    angles_MK = rope.temporal_angles(frame_M - world.first, denoiser.config.head_size)
    keys = tuple(rope.rotate(k, angles_MK) for k in world.kv.keys)
    kv = FrameKV(keys, world.kv.values)
    return Past(kv, jnp.stack(visible_TM)[None], position_B=(number - world.first)[None])


def earlier(denoiser: Denoiser, world: World, number: jax.Array | None = None) -> jax.Array | None:
    """The frames before frame `number`, newest first: [B, H, W, 3 · history], or None without.

    The number is that of the next frame by default. Before the first frame, the first is repeated.
    """
    if not denoiser.config.history:
        return None
    number = world.count if number is None else number
    frame_H = jnp.maximum(number - 1 - np.arange(denoiser.config.history), world.first)
    return jnp.concatenate([world.frames_BMHWC[:, j % world.slots] for j in frame_H], axis=-1)


def advance(
    denoiser: Denoiser, context: Modulations, world: World, frame_BHWC, action_B, window: Window
):
    """The world after one more frame: stores the frame and its action, and updates the cache.

    `context` holds the modulations of a clean frame for each action, [A + 1, ...]; −1 is the last.
    """
    following = _entered(world, frame_BHWC, action_B)
    append = lambda: _append(denoiser, context, world, following, frame_BHWC, action_B)[0]
    return _slid(denoiser, context, world, following, window, append)


def enter(
    denoiser: Denoiser, context: Modulations, world: World, frame_BHWC, action_B, window: Window
):
    """As `advance`, but the new frame is not encoded unless the whole window is."""
    following = _entered(world, frame_BHWC, action_B)
    return _slid(denoiser, context, world, following, window, lambda: _counted(following))


def first_frame(denoiser: Denoiser, frame_BHWC, action_B) -> World:
    """Worlds of a single frame, which is not encoded yet."""
    config = denoiser.config
    batch, slots = len(frame_BHWC), config.max_frames - 1
    shape = batch, config.tokens, config.num_heads, slots, config.head_size
    blank = (jnp.zeros(shape, config.compute_dtype),) * config.depth
    zero = jnp.zeros((), jnp.int32)
    empty = World(
        frames_BMHWC=jnp.zeros((batch, slots, *frame_BHWC.shape[1:])),
        actions_BM=jnp.zeros((batch, slots), jnp.int32),
        kv=FrameKV(blank, blank),
        first=zero,
        count=zero,
    )
    return _counted(_entered(empty, frame_BHWC, action_B))


def encode_newest(
    denoiser: Denoiser,
    context: Modulations,
    world: World,
    sample_BHWC: jax.Array,
    modulations: Modulations,
    window: Window,
) -> tuple[World, Past, Outputs]:
    """One forward pass of the newest frame and of a noisy sample of the next one.

    Equal to encoding the newest frame first (`advance`), in one pass less. (Not quite with a
    history of M frames, "cached": then the oldest of the newest frame's history is gone.)

    Args:
        world: as `enter` leaves it.
        modulations: of the sample, [B, ...].
        window: that of `enter`.

    Returns:
        The world with the newest frame in its cache, what the next frame attends to (`past`), and
        the outputs for the sample, T = 1.
    """
    newest, slot = world.count - 1, (world.count - 1) % world.slots
    both = lambda *pair: None if pair[0] is None else jnp.stack(pair, axis=1)
    before_BHWC = earlier(denoiser, world, newest)
    clean_BHWC = denoiser.to_sample(world.frames_BMHWC[:, slot], before_BHWC)
    tokens_B2SD = denoiser.net.tokens(
        both(clean_BHWC, sample_BHWC), both(before_BHWC, earlier(denoiser, world))
    )
    of_newest = jax.tree.map(lambda table: table[world.actions_BM[:, slot]], context)
    of_both = jax.tree.map(both, of_newest, modulations)
    frame_M = _held(world, newest)
    of_next = of_newest = frame_M >= world.first
    if window == "cached":
        # The newest frame still sees the one whose slot it takes.
        of_newest = frame_M >= jnp.maximum(newest - world.slots, 0)
    before = _past(denoiser, world, frame_M, newest, [of_newest, of_next])
    stream, kv = denoiser.net.frames(tokens_B2SD, of_both, before)
    outputs = denoiser.net.outputs(stream, jax.tree.map(lambda x: x[:, 1:], of_both))
    angles_K = rope.temporal_angles(newest - world.first, denoiser.config.head_size)
    rotated = FrameKV(tuple(rope.rotate(k, angles_K) for k in kv.keys), kv.values)
    following = dataclasses.replace(world, kv=_with_newest(world.kv, slot, kv))
    keys = _with_newest(before.kv, slot, rotated).keys
    visible = before.visible_BTM[:, 1:].at[..., slot].set(True)
    after = Past(FrameKV(keys, following.kv.values), visible, before.position_B + 1)
    return following, after, outputs


def _slid(denoiser, context, world: World, following: World, window: Window, otherwise) -> World:
    """The world that `otherwise` gives, but a full window is encoded again where `window` says."""
    if window == "cached":
        return otherwise()
    full = world.count - world.first == world.slots
    keep = world.slots if window == "exact" else (world.slots + 1) // 2
    return jax.lax.cond(full, lambda: _reencode(denoiser, context, following, keep), otherwise)


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
    stream, new = denoiser.net.frames(tokens, modulations, past(denoiser, world))
    kv = _with_newest(world.kv, world.count % world.slots, new)
    return dataclasses.replace(_counted(following), kv=kv), stream


def _counted(following: World) -> World:
    """The world with its new frame counted; in a full ring buffer the oldest one leaves."""
    count = following.count + 1
    first = jnp.maximum(following.first, count - following.slots)
    return dataclasses.replace(following, first=first, count=count)


def _with_newest(ring: FrameKV, slot: jax.Array, new: FrameKV) -> FrameKV:
    """The ring buffer with the first of new frames, [B, T, S, N, K], in this slot."""
    return jax.tree.map(lambda old, kv: old.at[:, :, :, slot].set(kv[:, 0]), ring, new)


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
