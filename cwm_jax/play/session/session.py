"""One player's session: drawn frame by frame, rewound, branched, shared, drawn again.

A session is its frames and actions. What the device remembers of it
(`cwm_jax.play.inference.staggered_cache`) is rebuilt from them whenever it is missing: after a
rewind, a branch, or a fault of the device.
"""

import asyncio
import secrets
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cwm_jax.controls import Controls
from cwm_jax.errors import UserError
from cwm_jax.play.inference.engine import LANES, Program
from cwm_jax.play.inference.scheduler import Drawn, Scheduler
from cwm_jax.play.inference.staggered_cache import first_remembered
from cwm_jax.play.session.history import History
from cwm_jax.play.session.prompt_sources import ClipPrompts, Prompt
from cwm_jax.play.session.share_code import MAX_FRAMES, Recipe

MAX_FUTURE = 32  # frames of what-if


class Branch(NamedTuple):
    """What the next frames would be under one action."""

    action: int
    frames: list[np.ndarray]
    programs: list[Program]


class Session:
    """Not for several tasks at once: await each call before the next.

    Args:
        prompt: the frames it starts from.
        known: what its game is played with.
        seed: of all noise, 0…2³² − 1; a random one by default.
    """

    def __init__(
        self, scheduler: Scheduler, prompt: Prompt, known: Controls, *, seed: int | None = None
    ):
        self._scheduler = scheduler
        self.prompt, self.known = prompt, known
        self.seed = secrets.randbits(32) if seed is None else seed
        self.history = History()
        for frame, action in zip(prompt.frames_PHWC, prompt.actions_P, strict=True):
            self.history.append(frame, action, None)
        self.at = len(self.history) - 1  # the frame that is shown; the next is drawn after it
        self.branches: list[Branch] = []
        self._memory: Any = None
        self._remembered = 0  # frames in `_memory`
        self._script: deque[tuple[int, Program]] = deque()  # still to be drawn again
        self._expected: int | None = None  # checksum of the frame that ends the script

    @property
    def window(self) -> int:
        """How many frames the next one looks back on."""
        return self.at + 1 - first_remembered(self.at + 1, self._scheduler.drawer.slots)

    @property
    def to_replay(self) -> int:
        """Frames of a share code that are still to be drawn."""
        return len(self._script)

    async def step(self, action: Callable[[], int], *, steps: int, unsure: bool = False) -> Drawn:
        """Draws the frame after the one shown; what came after it before is forgotten.

        Args:
            action: asked when the drawing begins.
            steps: DDIM steps, one of the drawer's.
            unsure: say of which patches the model is unsure, see `Scheduler.draw`.

        Raises:
            UserError: where the session has all the frames that one may have.
        """
        self._room_for(1)
        self.branches, self._script = [], deque()
        return await self._draw(action, steps, None, unsure)

    async def replay_step(self, *, unsure: bool = False) -> Drawn:
        """Draws the next frame of a share code.

        Raises:
            UserError: at its end, where the last frame is not the one that was shared.
        """
        action, program = self._script.popleft()
        drawn = await self._draw(lambda: action, *program, unsure)
        if not self._script and zlib.crc32(drawn.frame.tobytes()) != self._expected:
            raise UserError(
                "the session was drawn again, but not to the very same frames: this machine "
                "rounds differently from the one where the code was made"
            )
        return drawn

    def rewind(self, to: int) -> np.ndarray:
        """Shows frame `to` (uint8 [H, W, C]); nothing is forgotten until a frame is drawn there.

        Raises:
            UserError: for a frame that there is not.
        """
        if not 0 <= to < len(self.history):
            raise UserError(f"there is no frame {to}: they count 0…{len(self.history) - 1}")
        self.at = max(to, self.history.given - 1)
        self.branches, self._script = [], deque()
        return self.history.frame(to)

    async def what_if(self, frames: int, *, steps: int) -> list[Branch]:
        """The next frames under each of the game's `futures`, all drawn together."""
        if not 1 <= frames <= MAX_FUTURE:
            raise UserError(f"what-if shows 1…{MAX_FUTURE} frames, not {frames}")
        self._room_for(frames)
        self._script = deque()
        branches = [Branch(action, [], []) for action in self.known.futures]
        self._scheduler.want_lanes(len(branches))
        memories = await asyncio.gather(*(self._recalled() for _ in branches))
        for number in range(self.at + 1, self.at + 1 + frames):
            orders = [
                self._order(memory, branch.action, number, steps)
                for memory, branch in zip(memories, branches, strict=True)
            ]
            results = await asyncio.gather(*orders)
            for branch, drawn in zip(branches, results, strict=True):
                branch.frames.append(drawn.frame)
                branch.programs.append(drawn.program)
            memories = [drawn.memory for drawn in results]
        self.branches = branches
        return branches

    def choose(self, branch: int) -> None:
        """Goes on where a branch of the last `what_if` ended.

        Raises:
            UserError: where there is no such branch.
        """
        if not 0 <= branch < len(self.branches):
            raise UserError(f"there is no branch {branch} to go on with; ask what-if first")
        action, frames, programs = self.branches[branch]
        self.history.cut(self.at + 1)
        for frame, program in zip(frames, programs, strict=True):
            self.history.append(frame, action, program)
        self.at, self.branches = len(self.history) - 1, []
        self._memory = None  # after a rewind it may be of as many frames, but of others

    def recipe(self) -> Recipe:
        """How to draw this session again, up to the frame that is shown."""
        drawn = slice(self.history.given, self.at + 1)
        return Recipe(
            self._scheduler.drawer.fingerprint,
            self.seed,
            self.prompt.source,
            self.prompt.checksum,
            self.history.actions[drawn],
            self.history.programs[drawn],
            zlib.crc32(self.history.frame(self.at).tobytes()),
        )

    @classmethod
    def from_recipe(cls, scheduler: Scheduler, prompts: ClipPrompts, recipe: Recipe) -> "Session":
        """A session that `replay_step` draws again; `to_replay` counts what is left.

        Raises:
            UserError: the code is for another checkpoint, other data, or another set of programs.
        """
        drawer = scheduler.drawer
        if recipe.fingerprint != drawer.fingerprint:
            raise UserError(
                f"this share code is for checkpoint {recipe.fingerprint.hex()}; "
                f"here {drawer.fingerprint.hex()} is played"
            )
        for steps, lanes in set(recipe.programs):
            if steps not in drawer.steps or lanes not in LANES:
                raise UserError(
                    f"this share code wants {steps} DDIM steps in batches of {lanes}; here there "
                    f"are {list(drawer.steps)} in batches of {list(LANES)}"
                )
        known = prompts.known
        if wrong := [
            a for a in recipe.actions if a != known.idle and a not in range(known.num_values)
        ]:
            raise UserError(
                f"this share code has action {wrong[0]}; {known.game} has 0…{known.num_values - 1}"
            )
        prompt = prompts.load(recipe.source)
        if prompt.checksum != recipe.prompt_checksum:
            raise UserError(
                f"this share code starts from another clip {recipe.source.number} than that of "
                "the data here; start play with the same --data"
            )
        session = cls(scheduler, prompt, known, seed=recipe.seed)
        session._script = deque(zip(recipe.actions, recipe.programs, strict=True))
        session._expected = recipe.last_frame
        return session

    def close(self) -> None:
        """Frees its disk space and its memory on the device."""
        self._memory, self.branches = None, []
        self.history.close()

    def _room_for(self, frames: int) -> None:
        if self.at + 1 - self.history.given + frames > MAX_FRAMES:
            raise UserError(
                f"a session has at most {MAX_FRAMES} frames: save it, then rewind or start anew"
            )

    async def _draw(self, action, steps: int, lanes: int | None, unsure: bool) -> Drawn:
        if self._memory is None or self._remembered != self.at + 1:
            self._memory = await self._recalled()
        memory, self._memory = self._memory, None  # used up, whatever happens
        how = dict(seed=self.seed, number=self.at + 1, steps=steps, lanes=lanes, unsure=unsure)
        order = self._scheduler.draw(memory, action, **how)
        drawn = await asyncio.wrap_future(order)
        self.history.cut(self.at + 1)
        self.history.append(drawn.frame, drawn.action, drawn.program)
        self.at += 1
        self._memory, self._remembered = drawn.memory, self.at + 1
        return drawn

    def _order(self, memory: Any, action: int, number: int, steps: int):
        order = self._scheduler.draw(
            memory, lambda: action, seed=self.seed, number=number, steps=steps
        )
        return asyncio.wrap_future(order)

    async def _recalled(self) -> Any:
        """The memory of all frames up to the one shown."""
        stop = self.at + 1
        start = first_remembered(stop, self._scheduler.drawer.slots)
        frames: Sequence[np.ndarray] = list(self.history.frames(start, stop))
        pairs = zip(frames, self.history.actions[start:stop], strict=True)
        return await asyncio.wrap_future(self._scheduler.recall(pairs))
