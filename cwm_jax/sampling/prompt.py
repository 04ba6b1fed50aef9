"""Prompt frames and actions, checked against the sizes of the network."""

from typing import Protocol

import numpy as np

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.errors import UserError


class Sizes(Protocol):
    """The sizes of a network that are needed here."""

    image_size: int
    max_frames: int
    action_values: int


def padded(sizes: Sizes, frames_BPHWC, actions_BP) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """A prompt's newest frames and actions, padded to a world's slots, and their number.

    Args:
        frames_BPHWC: uint8, 1 ≤ P ≤ `max_frames`.
        actions_BP: the action that led into each frame; the first may be −1 (none).

    Raises:
        UserError: for a prompt that does not fit the network, naming the value.
    """
    frames_BPHWC, actions_BP = np.asarray(frames_BPHWC), np.asarray(actions_BP)
    _check(sizes, frames_BPHWC, actions_BP)
    slots = sizes.max_frames - 1
    frames_BPHWC, actions_BP = frames_BPHWC[:, -slots:], actions_BP[:, -slots:]
    count = frames_BPHWC.shape[1]
    pad = ((0, 0), (0, slots - count))
    frames_BMHWC = np.pad(frames_BPHWC, (*pad, (0, 0), (0, 0), (0, 0)))
    actions_BM = np.pad(actions_BP, pad, constant_values=NO_ACTION).astype(np.int32)
    return frames_BMHWC, actions_BM, np.int32(count)


def next_actions(sizes: Sizes, actions_BF, worlds: int) -> np.ndarray:
    """The actions of frames to generate, int32 [B, F].

    Raises:
        UserError: for an action that does not exist, or a wrong number of worlds.
    """
    actions_BF = np.asarray(actions_BF)
    if actions_BF.ndim != 2 or len(actions_BF) != worlds:
        raise UserError(
            f"actions of shape {actions_BF.shape} for {worlds} worlds must be [worlds, frames]"
        )
    _check_actions(sizes, actions_BF, lowest=0)
    return actions_BF.astype(np.int32)


def _check(sizes: Sizes, frames_BPHWC: np.ndarray, actions_BP: np.ndarray) -> None:
    size, shape = sizes.image_size, frames_BPHWC.shape
    if frames_BPHWC.dtype != np.uint8 or len(shape) != 5 or shape[2:] != (size, size, 3):
        raise UserError(
            f"prompt frames are {frames_BPHWC.dtype} {shape}: they must be uint8 "
            f"[worlds, frames, {size}, {size}, 3]"
        )
    if not 1 <= shape[1] <= sizes.max_frames:
        raise UserError(
            f"{shape[1]} prompt frames: this network takes 1…{sizes.max_frames} (its window)"
        )
    if actions_BP.shape != shape[:2]:
        raise UserError(
            f"{shape[1]} prompt frames but actions of shape {actions_BP.shape}: each frame "
            "needs the action that led into it (−1 for the first)"
        )
    _check_actions(sizes, actions_BP[:, :1], lowest=NO_ACTION)
    _check_actions(sizes, actions_BP[:, 1:], lowest=0)


def _check_actions(sizes: Sizes, actions: np.ndarray, *, lowest: int) -> None:
    if not np.issubdtype(actions.dtype, np.integer):
        raise UserError(f"actions must be whole numbers, not {actions.dtype}")
    wrong = actions[(actions < lowest) | (actions >= sizes.action_values)]
    if wrong.size:
        raise UserError(
            f"action {wrong[0]}: actions are 0…{sizes.action_values - 1}"
            + ("" if lowest else "; −1 (none) is allowed only for the first frame")
        )
