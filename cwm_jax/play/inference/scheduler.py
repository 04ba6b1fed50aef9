"""A thread that owns the device and generates the next frames of all players in batches."""

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from cwm_jax.errors import echo
from cwm_jax.play.inference.engine import LANES, Lane, Program
from cwm_jax.play.inference.governor import Governor

_FRAMES_A_TURN = 4  # frames appended to a rebuilt cache before other orders are served


class FrameGenerator(Protocol):
    """An `engine.Engine`, or `episode_playback.RealClips` without a network."""

    steps: tuple[int, ...]  # numbers of DDIM steps that a player may choose
    automatic: tuple[int, ...]  # those of them for automatic choice
    playable: tuple[int, ...] | None  # the steps that the model's card lists; None: no card
    slots: int
    fingerprint: bytes

    def ready(self, steps: int) -> tuple[int, ...]: ...
    def compile(self, steps: int, lanes: int) -> None: ...
    def fresh(self) -> Any: ...
    def append(self, cache: Any, frame_u8_HWC: np.ndarray, action: int) -> Any: ...
    def generate(self, wanted: Sequence[Lane], steps: int, lanes: int) -> np.ndarray: ...
    def compile_unsure(self, steps: int) -> None: ...
    def unsure(self, wanted: Lane, steps: int) -> np.ndarray | None: ...


class Generated(NamedTuple):
    frame: np.ndarray  # uint8 [H, W, C]
    action: int
    program: Program
    cache: Any  # including this frame
    unsure: np.ndarray | None = None  # see `Engine.unsure`; None: not asked for, or not compiled


@dataclasses.dataclass
class _Generation:
    cache: Any
    action: Callable[[], int]  # called when generation begins, so that the latest key counts
    seed: int
    number: int
    steps: int
    lanes: int | None  # None: as needed for the batch
    unsure: bool
    done: Future


@dataclasses.dataclass
class _Rebuild:
    frames: deque[tuple[np.ndarray, int]]
    cache: Any
    done: Future


class Scheduler:
    """Generates frames for all players in order of arrival; waiting players share a batch.

    Every call returns a future at once. A player orders at most one frame at a time (or a few, for
    what-if), so no player waits indefinitely. Use it as a context manager.
    """

    def __init__(
        self, generator: FrameGenerator, *, clock: Callable[[], float] = time.perf_counter
    ):
        self.generator = generator
        self.governor = Governor(generator.automatic, clock, playable=generator.playable)
        self._clock = clock
        self._orders: queue.SimpleQueue[_Generation | _Rebuild | None] = queue.SimpleQueue()
        self._to_compile: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._requested: set[tuple[int, int]] = set()
        self._waiting: list[_Generation | _Rebuild] = []
        self._stopped = threading.Event()
        self.first_program = threading.Event()  # set when the first frame can be generated
        self.fault: BaseException | None = None  # why the first program could not be compiled
        self._threads = [
            threading.Thread(target=target, name=f"play-{name}", daemon=True)
            for name, target in (("device", self._work), ("compiler", self._compile))
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.want_lanes(1)
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self.first_program.set()  # releases waiting threads
        self._orders.put(None)
        self._to_compile.put(None)
        for thread in self._threads:
            thread.join(timeout=60)

    def want_lanes(self, players: int) -> None:
        """Prepares for so many players: compiles the programs for them in the background.

        Until then they are served in smaller batches.
        """
        lanes = next((n for n in LANES if n >= players), LANES[-1])
        for steps in sorted(self.generator.steps, key=lambda n: n != self.governor.steps):
            self._request(steps, lanes)

    def _request(self, steps: int, lanes: int | None) -> None:
        """Compiles in the background; no number of lanes: what `unsure` needs."""
        if (steps, lanes) not in self._requested:
            self._requested.add((steps, lanes))
            self._to_compile.put((steps, lanes))

    def choose_steps(self, fps: float) -> int:
        """DDIM steps that reach so many frames a second, among those that are compiled."""
        compiled = [steps for steps in self.generator.automatic if self.generator.ready(steps)]
        return self.governor.choose(fps, compiled)

    def generate(
        self,
        cache: Any,
        action: Callable[[], int],
        *,
        seed: int,
        number: int,
        steps: int,
        lanes: int | None = None,
        unsure: bool = False,
    ) -> Future[Generated]:
        """Generates frame `number` of a session after `cache`, which is consumed.

        Args:
            action: called when generation begins.
            lanes: the exact size of the batch, to repeat a recorded frame.
            unsure: report of which patches the model is unsure, once that is compiled.
        """
        order = _Generation(cache, action, seed, number, steps, lanes, unsure, Future())
        return self._order(order)

    def rebuild(self, frames_and_actions) -> Future[Any]:
        """A cache of these frames, pairs of uint8 [H, W, C] and the action that led into each."""
        return self._order(_Rebuild(deque(frames_and_actions), None, Future()))

    def _order(self, order):
        if self._stopped.is_set():
            order.done.set_exception(RuntimeError("the scheduler has stopped"))
        else:
            self._orders.put(order)
        return order.done

    def _compile(self) -> None:
        while (wanted := self._to_compile.get()) is not None and not self._stopped.is_set():
            try:
                self._compile_one(*wanted)
            except (
                Exception
            ) as error:  # most likely out of memory: play continues with other programs
                if not self.first_program.is_set():
                    self.fault = error
                what = "the overlay" if wanted[1] is None else f"{wanted[1]} lanes"
                echo(f"could not compile {what} of {wanted[0]} steps: {error}")
            self.first_program.set()

    def _compile_one(self, steps: int, lanes: int | None) -> None:
        if lanes is None:
            self.generator.compile_unsure(steps)
        else:
            self.generator.compile(steps, lanes)

    def _work(self) -> None:
        self.first_program.wait()
        while not self._stopped.is_set():
            if not self._take_orders():
                break
            if isinstance(self._waiting[0], _Rebuild):
                self._rebuild_a_little(self._waiting.pop(0))
            else:
                self._generate_together()
        for order in self._waiting:
            order.done.cancel()

    def _take_orders(self) -> bool:
        """Collects all orders, waits if there are none; False at the end."""
        block = not self._waiting
        while True:
            try:
                order = self._orders.get(block=block)
            except queue.Empty:
                return True
            if order is None:
                return False
            if not order.done.cancelled():
                self._waiting.append(order)
            block = not self._waiting

    def _rebuild_a_little(self, order: _Rebuild) -> None:
        try:
            if order.cache is None:
                order.cache = self.generator.fresh()
            for _ in range(min(_FRAMES_A_TURN, len(order.frames))):
                order.cache = self.generator.append(order.cache, *order.frames.popleft())
        except Exception as error:
            _fail(order.done, error)
            return
        if order.frames:
            self._waiting.append(order)
        else:
            _deliver(order.done, order.cache)

    def _generate_together(self) -> None:
        first = self._waiting[0]
        group = [
            order
            for order in self._waiting
            if isinstance(order, _Generation)
            and (order.steps, order.lanes) == (first.steps, first.lanes)
        ]
        lanes = first.lanes or self._lanes_for(len(group), first.steps)
        group = group[:lanes]
        self._waiting = [order for order in self._waiting if all(order is not o for o in group)]
        began = self._clock()
        try:
            if lanes not in self.generator.ready(first.steps):  # a recorded session may need it
                self.generator.compile(first.steps, lanes)
                began = self._clock()
            wanted = [Lane(o.cache, o.action(), o.seed, o.number) for o in group]
            frames = self.generator.generate(wanted, first.steps, lanes)
            generated_at = self._clock()
            unsure = [self._unsure(o, lane) for o, lane in zip(group, wanted, strict=True)]
            began += self._clock() - generated_at  # so that an overlay never costs denoising steps
            caches = [
                self.generator.append(lane.cache, frame, lane.action)
                for lane, frame in zip(wanted, frames, strict=True)
            ]  # runs while the frames are sent
        except (
            Exception
        ) as error:  # of the device, such as out of memory: reported to these players
            for order in group:
                _fail(order.done, error)
            return
        program = Program(first.steps, lanes)
        results = zip(group, wanted, frames, caches, unsure, strict=True)
        for order, lane, frame, cache, patches in results:
            _deliver(order.done, Generated(frame, lane.action, program, cache, patches))
        jax.block_until_ready(caches)
        self.governor.note(steps=first.steps, seconds=self._clock() - began)

    def _unsure(self, order: _Generation, lane: Lane) -> np.ndarray | None:
        """Of which patches the model is unsure, if that is asked for and compiled."""
        if not order.unsure:
            return None
        self._request(order.steps, None)
        return self.generator.unsure(lane, order.steps)

    def _lanes_for(self, players: int, steps: int) -> int:
        """The smallest compiled batch for so many players, or else the largest."""
        ready = self.generator.ready(steps)
        if not ready:
            self.generator.compile(steps, 1)
            ready = (1,)
        return next((lanes for lanes in ready if lanes >= players), ready[-1])


def _deliver(done: Future, result: Any) -> None:
    if done.set_running_or_notify_cancel():
        done.set_result(result)


def _fail(done: Future, error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
