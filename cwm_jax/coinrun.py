"""Facts of the game: frame size, actions, keys, and pixels to model input and back.

CoinRun is a game of the Procgen benchmark (Cobbe et al. 2020, https://arxiv.org/abs/1912.01588);
its 15 actions are those of `procgen/env.py`: nine combinations of the arrow keys, then six keys
that do nothing in CoinRun.
"""

from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 64
CHANNELS = 3
FRAME_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, CHANNELS)
GAMES = (  # of Procgen: all have these actions
    *("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball"),
    *("fruitbot", "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot"),
)
FPS = 15  # a comfortable playback rate; the simulator has no clock

NO_ACTION = -1  # no action led to this frame: frame 0 of a clip; a zero vector for the model


class Keys(NamedTuple):
    """Which arrow keys an action holds down."""

    left: bool = False
    right: bool = False
    up: bool = False
    down: bool = False


ACTION_NAMES = (
    "LEFT+DOWN",
    "LEFT",
    "LEFT+UP",
    "DOWN",
    "NOOP",
    "UP",
    "RIGHT+DOWN",
    "RIGHT",
    "RIGHT+UP",
    "D",
    "A",
    "W",
    "S",
    "Q",
    "E",
)
NUM_ACTIONS = len(ACTION_NAMES)
LEFT, JUMP_LEFT, NOOP, JUMP, RIGHT, JUMP_RIGHT = 1, 2, 4, 5, 7, 8
MEANINGFUL_ACTIONS = (LEFT, JUMP_LEFT, NOOP, JUMP, RIGHT, JUMP_RIGHT)  # the rest repeat these


def action_keys(action: int) -> Keys:
    """The arrow keys held by `action` (0…14, or NO_ACTION: none)."""
    if not 0 <= action < NUM_ACTIONS:
        return Keys()
    parts = ACTION_NAMES[action].split("+")
    return Keys(*(name.upper() in parts for name in Keys._fields))


def mirrored(action: int) -> int:
    """The action that does in a mirror what `action` does: left and right are exchanged."""
    other = {"LEFT": "RIGHT", "RIGHT": "LEFT"}
    if action == NO_ACTION:
        return NO_ACTION
    parts = ACTION_NAMES[action].split("+")
    return ACTION_NAMES.index("+".join(other.get(part, part) for part in parts))


def action_name(action: int) -> str:
    """A short name to show under a frame; `NO_ACTION` reads as a dash."""
    return ACTION_NAMES[action] if 0 <= action < NUM_ACTIONS else "–"


def to_model(frames_u8):
    """uint8 pixels 0…255 to float32 in [-1, 1]; takes NumPy or JAX arrays of any shape."""
    return frames_u8.astype(np.float32) / 255 * 2 - 1


def to_pixels(frames):
    """Floats, clamped to [-1, 1], to uint8 pixels; the inverse of `to_model` for every uint8."""
    return ((frames.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
