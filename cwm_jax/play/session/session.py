"""One player's session: generated frame by frame, rewound, branched, shared, replayed.

A session is its frames and actions. Its cache on the device
(`cwm_jax.sampling.staggered_cache`) is rebuilt from them whenever it is missing: after a
rewind, a branch, or an error of the device.
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
from cwm_jax.play.inference.scheduler import Generated, Scheduler
from cwm_jax.play.session.history import History
from cwm_jax.play.session.prompt_sources import ClipPrompts, Prompt
from cwm_jax.play.session.share_code import MAX_FRAMES, Recipe
from cwm_jax.sampling.staggered_cache import first_cached

MAX_FUTURE = 32  # frames of what-if


class Branch(NamedTuple):
    """What the next frames would be under one action."""

    action: int
    frames: list[np.ndarray]
    programs: list[Program]


class Session:
    """Not for concurrent use: await each call before the next.

    Args:
        prompt: the frames that it starts from.
        known: the game's controls.
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
        self.at = len(self.history) - 1  # the shown frame; the next one follows it
        self.branches: list[Branch] = []
        self._cache: Any = None
        self._cached = 0  # frames in `_cache`
        self._script: deque[tuple[int, Program]] = deque()  # still to be replayed
        self._expected: int | None = None  # checksum of the frame that ends the script

    @property
    def window(self) -> int:
        """The number of frames that the next one attends to."""
        return self.at + 1 - first_cached(self.at + 1, self._scheduler.generator.slots)

    @property
    def to_replay(self) -> int:
        """Frames of a share code that are still to be generated."""
        return len(self._script)

    async def step(
        self, action: Callable[[], int], *, steps: int, unsure: bool = False
    ) -> Generated:
        """Generates the frame after the shown one; frames that followed it before are removed.

        Args:
            action: called when generation begins.
            steps: DDIM steps, one of the generator's.
            unsure: report of which patches the model is unsure, see `Scheduler.generate`.

        Raises:
            UserError: the session has the largest number of frames.
        """
        self._room_for(1)
        self.branches, self._script = [], deque()
        return await self._generate(action, steps, None, unsure)

    async def replay_step(self, *, unsure: bool = False) -> Generated:
        """Generates the next frame of a share code.

        Raises:
            UserError: at the end, if the last frame differs from the shared one.
        """
        action, program = self._script.popleft()
        generated = await self._generate(lambda: action, *program, unsure)
        if not self._script and zlib.crc32(generated.frame.tobytes()) != self._expected:
            raise UserError(
                "the replayed frames are not identical: this machine rounds differently from the "
                "one where the code was made"
            )
        return generated

    def rewind(self, to: int) -> np.ndarray:
        """Shows frame `to` (uint8 [H, W, C]); later frames are kept until a new one is generated.

        Raises:
            UserError: there is no such frame.
        """
        if not 0 <= to < len(self.history):
            raise UserError(f"there is no frame {to}: frames are 0…{len(self.history) - 1}")
        self.at = max(to, self.history.given - 1)
        self.branches, self._script = [], deque()
        return self.history.frame(to)

    async def what_if(self, frames: int, *, steps: int) -> list[Branch]:
        """The next frames under each of the game's `futures`, generated in one batch."""
        if not 1 <= frames <= MAX_FUTURE:
            raise UserError(f"what-if shows 1…{MAX_FUTURE} frames, not {frames}")
        self._room_for(frames)
        self._script = deque()
        branches = [Branch(action, [], []) for action in self.known.futures]
        self._scheduler.want_lanes(len(branches))
        caches = await asyncio.gather(*(self._rebuilt() for _ in branches))
        for number in range(self.at + 1, self.at + 1 + frames):
            orders = [
                self._order(cache, branch.action, number, steps)
                for cache, branch in zip(caches, branches, strict=True)
            ]
            results = await asyncio.gather(*orders)
            for branch, generated in zip(branches, results, strict=True):
                branch.frames.append(generated.frame)
                branch.programs.append(generated.program)
            caches = [generated.cache for generated in results]
        self.branches = branches
        return branches

    def choose(self, branch: int) -> None:
        """Continues from the end of a branch of the last `what_if`.

        Raises:
            UserError: there is no such branch.
        """
        if not 0 <= branch < len(self.branches):
            raise UserError(f"there is no branch {branch} to continue; use what-if first")
        action, frames, programs = self.branches[branch]
        self.history.cut(self.at + 1)
        for frame, program in zip(frames, programs, strict=True):
            self.history.append(frame, action, program)
        self.at, self.branches = len(self.history) - 1, []
        self._cache = None  # after a rewind it may have the same number of other frames

    def recipe(self) -> Recipe:
        """The recipe to replay this session up to the shown frame."""
        played = slice(self.history.given, self.at + 1)
        return Recipe(
            self._scheduler.generator.fingerprint,
            self.seed,
            self.prompt.source,
            self.prompt.checksum,
            self.history.actions[played],
            self.history.programs[played],
            zlib.crc32(self.history.frame(self.at).tobytes()),
        )

    @classmethod
    def from_recipe(cls, scheduler: Scheduler, prompts: ClipPrompts, recipe: Recipe) -> "Session":
        """A session to replay by `replay_step`; `to_replay` counts the remaining frames.

        Raises:
            UserError: the code is for another checkpoint, other data, or other programs.
        """
        generator = scheduler.generator
        if recipe.fingerprint != generator.fingerprint:
            raise UserError(
                f"this share code is for checkpoint {recipe.fingerprint.hex()}; "
                f"the loaded one is {generator.fingerprint.hex()}"
            )
        for steps, lanes in set(recipe.programs):
            if steps not in generator.steps or lanes not in LANES:
                raise UserError(
                    f"this share code needs {steps} DDIM steps in batches of {lanes}; available "
                    f"are {list(generator.steps)} in batches of {list(LANES)}"
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
                f"this share code starts from another clip {recipe.source.number} than the one of "
                "this data; start play with the same --data"
            )
        session = cls(scheduler, prompt, known, seed=recipe.seed)
        session._script = deque(zip(recipe.actions, recipe.programs, strict=True))
        session._expected = recipe.last_frame
        return session

    def close(self) -> None:
        """Frees its disk space and its cache on the device."""
        self._cache, self.branches = None, []
        self.history.close()

    def _room_for(self, frames: int) -> None:
        if self.at + 1 - self.history.given + frames > MAX_FRAMES:
            raise UserError(
                f"a session has at most {MAX_FRAMES} frames: save it, then start a new one"
            )

    async def _generate(self, action, steps: int, lanes: int | None, unsure: bool) -> Generated:
        if self._cache is None or self._cached != self.at + 1:
            self._cache = await self._rebuilt()
        cache, self._cache = self._cache, None  # donated, even if an error follows
        how = dict(seed=self.seed, number=self.at + 1, steps=steps, lanes=lanes, unsure=unsure)
        order = self._scheduler.generate(cache, action, **how)
        generated = await asyncio.wrap_future(order)
        self.history.cut(self.at + 1)
        self.history.append(generated.frame, generated.action, generated.program)
        self.at += 1
        self._cache, self._cached = generated.cache, self.at + 1
        return generated

    def _order(self, cache: Any, action: int, number: int, steps: int):
        order = self._scheduler.generate(
            cache, lambda: action, seed=self.seed, number=number, steps=steps
        )
        return asyncio.wrap_future(order)

    async def _rebuilt(self) -> Any:
        """The cache of all frames up to the shown one."""
        stop = self.at + 1
        start = first_cached(stop, self._scheduler.generator.slots)
        frames: Sequence[np.ndarray] = list(self.history.frames(start, stop))
        pairs = zip(frames, self.history.actions[start:stop], strict=True)
        return await asyncio.wrap_future(self._scheduler.rebuild(pairs))
