"""The controls of a game: names and keys of its actions or buttons.

A data folder lists them in its `metadata.json`. Without them the game is CoinRun; actions of which
only the number is given are named by their numbers.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwm_jax import coinrun, files, shipped
from cwm_jax.errors import UserError

METADATA = "metadata.json"
ENCODINGS = ("one_hot", "buttons")
MAX_BUTTONS = 8  # 256 combinations; a sampler tabulates each, 1.7 MB for the full network
MAX_FUTURES = 8  # as many as are generated in one batch
_IDLE_NAMES = ("NOOP", "NONE", "NOTHING", "STAY", "IDLE", "WAIT")
_ARROWS = {"LEFT": "ArrowLeft", "RIGHT": "ArrowRight", "UP": "ArrowUp", "DOWN": "ArrowDown"}


@dataclasses.dataclass(frozen=True)
class Control:
    """One action, or one button."""

    name: str  # shown under a frame
    keys: tuple[str, ...] = ()  # held down for it, named as browsers do in `KeyboardEvent.code`


@dataclasses.dataclass(frozen=True)
class Controls:
    """All controls of one game.

    Fields:
        game: the game's name.
        encoding: "one_hot": an action is the number of one control; "buttons": any controls can
            be held together, and bit i of an action is control i.
        controls: in the order of their numbers.
    """

    game: str
    encoding: str
    controls: tuple[Control, ...]

    def __post_init__(self):
        if self.encoding not in ENCODINGS:
            raise UserError(f"encoding is {self.encoding!r}; use one of {', '.join(ENCODINGS)}")
        if not self.controls or (self.encoding == "buttons" and len(self.controls) > MAX_BUTTONS):
            raise UserError(
                f"{self.game} has {len(self.controls)} {self.encoding} controls; there must be at "
                f"least 1, and at most {MAX_BUTTONS} buttons"
            )

    @property
    def num_values(self) -> int:
        """Actions are 0 … num_values − 1."""
        count = len(self.controls)
        return count if self.encoding == "one_hot" else 2**count

    @property
    def is_procgen(self) -> bool:
        """Whether these are the 15 actions that Procgen's games share."""
        return tuple(control.name for control in self.controls) == coinrun.ACTION_NAMES

    @property
    def idle(self) -> int:
        """The action while nothing is pressed.

        For buttons 0. Otherwise the control named as doing nothing (`NOOP`, `STAY`, …), else the
        first without keys, else `NO_ACTION`.
        """
        if self.encoding == "buttons":
            return 0
        named = [i for i, c in enumerate(self.controls) if c.name.upper() in _IDLE_NAMES]
        keyless = [i for i, c in enumerate(self.controls) if not c.keys]
        return next(iter(named + keyless), coinrun.NO_ACTION)

    @property
    def futures(self) -> tuple[int, ...]:
        """The actions that what-if compares: nothing, and each control alone; 8 at most."""
        if self.is_procgen:
            return coinrun.MEANINGFUL_ACTIONS
        count = range(len(self.controls))
        alone = [1 << i for i in count] if self.encoding == "buttons" else count
        every = dict.fromkeys([self.idle, *alone])
        return tuple(action for action in every if action != coinrun.NO_ACTION)[:MAX_FUTURES]

    def held(self, action: int) -> tuple[Control, ...]:
        """The controls in use; none for `NO_ACTION`."""
        if not 0 <= action < self.num_values:
            return ()
        if self.encoding == "one_hot":
            return (self.controls[action],)
        return tuple(c for bit, c in enumerate(self.controls) if action >> bit & 1)

    def name(self, action: int) -> str:
        """A short name to show under a frame."""
        if not 0 <= action < self.num_values:
            return "-"
        return "+".join(control.name for control in self.held(action)) or "NOOP"

    def to_json(self) -> dict[str, Any]:
        """The fields of `metadata.json` that describe the controls."""
        return {
            "game": self.game,
            "num_actions": len(self.controls),
            "action_encoding": self.encoding,
            "actions": [{"name": c.name, "keys": list(c.keys)} for c in self.controls],
        }


def procgen(game: str) -> Controls:
    """The 15 actions that all Procgen games share: arrow keys, then D, A, W, S, Q and E."""
    controls = []
    for name in coinrun.ACTION_NAMES:
        words = () if name == "NOOP" else name.split("+")
        controls.append(Control(name, tuple(_ARROWS.get(word, f"Key{word}") for word in words)))
    return Controls(game, "one_hot", tuple(controls))


def from_json(fields: Mapping[str, Any], source: str | os.PathLike) -> Controls:
    """The controls that a JSON object or a key map describes.

    Raises:
        UserError: naming the field of `source` that is wrong.
    """
    actions = fields.get("actions")
    if not isinstance(actions, list):
        raise UserError(
            f"{source}: `actions` must be a list of {{name, keys}}, or of names, not {actions!r}"
        )
    controls = []
    for number, action in enumerate(actions):
        action = {"name": action} if isinstance(action, str) else action
        name = action.get("name") if isinstance(action, dict) else None
        keys = action.get("keys", []) if isinstance(action, dict) else None
        if not isinstance(name, str) or not name or not isinstance(keys, list):
            raise UserError(
                f"{source}: action {number} is {action!r}; it needs a name and a list of keys"
            )
        controls.append(Control(name, tuple(map(str, keys))))
    names = [control.name for control in controls]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{source}: {sorted(twice)[0]!r} is the name of two actions")
    encoding = fields.get("action_encoding", "one_hot")
    return Controls(str(fields.get("game", "game")), encoding, tuple(controls))


def read(folder: str | os.PathLike) -> Controls:
    """The controls of a data folder; CoinRun's without metadata, or where it lists none.

    Raises:
        UserError: `metadata.json` is not JSON, or its controls are not valid.
    """
    path = shipped.found(folder) / METADATA
    try:
        fields = files.read_json_object(path)
    except FileNotFoundError:
        fields = {}
    return from_json(fields, path) if "actions" in fields else _counted(fields, path)


def _counted(fields: Mapping[str, Any], source: Path) -> Controls:
    """The controls where only their number is given, as by other recorders of this format."""
    count = fields.get("num_actions", coinrun.NUM_ACTIONS)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"{source}: num_actions is {count!r}; it must be a whole number, 1 or more")
    game = str(fields.get("game") or fields.get("env") or "coinrun")
    words = re.split("[^a-z]+", game.lower())
    known = next((name for name in coinrun.GAMES if name in words), None)
    if count == coinrun.NUM_ACTIONS and (known or "num_actions" not in fields):
        return procgen(known or game)
    encoding = fields.get("action_encoding", "one_hot")
    return Controls(game, encoding, tuple(Control(str(number)) for number in range(count)))
