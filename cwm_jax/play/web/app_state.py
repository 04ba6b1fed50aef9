"""State shared by all players: the device, the prompts, the players, the stage of the start."""

import dataclasses
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # JAX and Grain take seconds to import, and the page does not need them
    from cwm_jax.play.inference.scheduler import Scheduler
    from cwm_jax.play.session.prompt_sources import ClipPrompts
    from cwm_jax.play.web.player import Player


@dataclasses.dataclass(frozen=True)
class Rules:
    """Options from the command line."""

    fps: int = 15  # frames a second, unless a player asks for another rate
    players: int = 8  # at most
    idle_seconds: float = 300.0  # a session ends after so long without a message
    steps: tuple[int, ...] = (10, 4, 2, 1)  # numbers of DDIM steps to choose from


class Studio:
    """State of the server; `stage` describes the start until `open` is called."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.stage = "Starting …"
        self.fault = ""  # why the start failed
        self.title = ""  # the checkpoint and its step
        self.demo = False
        self.scheduler: Scheduler | None = None
        self.prompts: ClipPrompts | None = None
        self.players: dict[str, Player] = {}  # by token, which only the player's page has

    def open(
        self, scheduler: "Scheduler", prompts: "ClipPrompts", *, title: str, demo: bool
    ) -> None:
        self.prompts, self.title, self.demo = prompts, title, demo
        self.scheduler = scheduler
        scheduler.want_lanes(len(self.players))  # players who connected during the start

    @property
    def is_open(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler and scheduler.first_program.is_set() and not scheduler.fault)

    def enter(self, player: "Player") -> str | None:
        """A token for this player, or None if there are too many players."""
        if len(self.players) >= self.rules.players:
            return None
        token = secrets.token_urlsafe(16)
        self.players[token] = player
        if self.scheduler:
            self.scheduler.want_lanes(len(self.players))
        return token

    def leave(self, token: str) -> None:
        self.players.pop(token, None)


class Downloads:
    """The files of one session, in a temporary folder."""

    _KEPT = 4

    def __init__(self):
        self._folder: tempfile.TemporaryDirectory | None = None
        self._paths: dict[str, Path] = {}

    def new(self, name: str) -> Path:
        """The path for a new file to download under this name."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cwm_jax_")
        while len(self._paths) >= self._KEPT:
            self._paths.pop(next(iter(self._paths))).unlink(missing_ok=True)
        self._paths[name] = Path(self._folder.name) / name
        return self._paths[name]

    def find(self, name: str) -> Path | None:
        path = self._paths.get(name)
        return path if path and path.is_file() else None

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._paths = {}
