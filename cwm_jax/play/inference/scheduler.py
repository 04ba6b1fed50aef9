"""One thread owns the device: it gathers what the players want next, and draws it together."""

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

from cwm_jax.errors import tell
from cwm_jax.play.inference.engine import LANES, Lane, Program
from cwm_jax.play.inference.governor import Governor

_PASSES_A_TURN = 4  # frames that a rebuilt memory takes in before others have their turn


class Drawer(Protocol):
    """What draws: `engine.Engine`, or `episode_playback.RealClips` where there is no network."""

    steps: tuple[int, ...]  # numbers of DDIM steps that a player may choose
    automatic: tuple[int, ...]  # those of them that are chosen where nobody does
    playable: tuple[int, ...] | None  # the steps that the model's card lists; None: it has no card
    slots: int
    fingerprint: bytes

    def ready(self, steps: int) -> tuple[int, ...]: ...
    def compile(self, steps: int, lanes: int) -> None: ...
    def fresh(self) -> Any: ...
    def remember(self, memory: Any, frame_u8_HWC: np.ndarray, action: int) -> Any: ...
    def draw(self, wanted: Sequence[Lane], steps: int, lanes: int) -> np.ndarray: ...
    def compile_unsure(self, steps: int) -> None: ...
    def unsure(self, wanted: Lane, steps: int) -> np.ndarray | None: ...


class Drawn(NamedTuple):
    frame: np.ndarray  # uint8 [H, W, C]
    action: int
    program: Program
    memory: Any  # with this frame in it
    unsure: np.ndarray | None = None  # see `Engine.unsure`; None: not asked for, or not compiled


@dataclasses.dataclass
class _Draw:
    memory: Any
    action: Callable[[], int]  # asked when the drawing begins: the latest key counts
    seed: int
    number: int
    steps: int
    lanes: int | None  # None: as many as are drawn together
    unsure: bool
    done: Future


@dataclasses.dataclass
class _Recall:
    frames: deque[tuple[np.ndarray, int]]
    memory: Any
    done: Future


class Scheduler:
    """Draws for all players, first come first served; players that wait together share a batch.

    Every call returns a future at once. A player who has at most one frame on order (or a few,
    for what-if) can therefore not starve the others. Use as a context manager.
    """

    def __init__(self, drawer: Drawer, *, clock: Callable[[], float] = time.perf_counter):
        self.drawer = drawer
        self.governor = Governor(drawer.automatic, clock, playable=drawer.playable)
        self._clock = clock
        self._orders: queue.SimpleQueue[_Draw | _Recall | None] = queue.SimpleQueue()
        # (steps, lanes), or (steps, None): what `Drawer.unsure` needs
        self._to_compile: queue.SimpleQueue[tuple[int, int | None] | None] = queue.SimpleQueue()
        self._asked: set[tuple[int, int | None]] = set()
        self._waiting: list[_Draw | _Recall] = []
        self._stopped = threading.Event()
        self.first_program = threading.Event()  # set when the first frame could be drawn
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
        self.first_program.set()  # nobody need wait for it any more
        self._orders.put(None)
        self._to_compile.put(None)
        for thread in self._threads:
            thread.join(timeout=60)

    def want_lanes(self, players: int) -> None:
        """So many may be drawn together from now on: compiles what that needs, behind the scenes.

        Until it is there they are drawn in smaller batches.
        """
        lanes = next((n for n in LANES if n >= players), LANES[-1])
        for steps in sorted(self.drawer.steps, key=lambda n: n != self.governor.steps):
            self._want(steps, lanes)

    def _want(self, steps: int, lanes: int | None) -> None:
        if (steps, lanes) not in self._asked:
            self._asked.add((steps, lanes))
            self._to_compile.put((steps, lanes))

    def choose_steps(self, fps: float) -> int:
        """DDIM steps that hold so many frames a second, among those that are compiled."""
        compiled = [steps for steps in self.drawer.automatic if self.drawer.ready(steps)]
        return self.governor.choose(fps, compiled)

    def draw(
        self,
        memory: Any,
        action: Callable[[], int],
        *,
        seed: int,
        number: int,
        steps: int,
        lanes: int | None = None,
        unsure: bool = False,
    ) -> Future[Drawn]:
        """Draws frame `number` of a session after `memory`, which is used up.

        Args:
            action: called when the drawing begins.
            lanes: draw it in a batch of just this size, as it once was.
            unsure: say of which patches the model is unsure, once that is compiled.
        """
        order = _Draw(memory, action, seed, number, steps, lanes, unsure, Future())
        return self._order(order)

    def recall(self, frames_and_actions) -> Future[Any]:
        """A memory of these frames, pairs of uint8 [H, W, C] and the action that led into it."""
        return self._order(_Recall(deque(frames_and_actions), None, Future()))

    def _order(self, order):
        if self._stopped.is_set():
            order.done.set_exception(RuntimeError("the device has been handed back"))
        else:
            self._orders.put(order)
        return order.done

    def _compile(self) -> None:
        while (wanted := self._to_compile.get()) is not None and not self._stopped.is_set():
            try:
                self._compile_one(*wanted)
            except Exception as error:  # out of memory, most likely: play goes on with what is
                if not self.first_program.is_set():
                    self.fault = error
                what = "the overlay" if wanted[1] is None else f"{wanted[1]} lanes"
                tell(f"could not compile {what} of {wanted[0]} steps: {error}")
            self.first_program.set()

    def _compile_one(self, steps: int, lanes: int | None) -> None:
        if lanes is None:
            self.drawer.compile_unsure(steps)
        else:
            self.drawer.compile(steps, lanes)

    def _work(self) -> None:
        self.first_program.wait()
        while not self._stopped.is_set():
            if not self._take_orders():
                break
            if isinstance(self._waiting[0], _Recall):
                self._recall_a_little(self._waiting.pop(0))
            else:
                self._draw_together()
        for order in self._waiting:
            order.done.cancel()

    def _take_orders(self) -> bool:
        """Everything that has been ordered, waiting if there is nothing; False at the end."""
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

    def _recall_a_little(self, order: _Recall) -> None:
        try:
            if order.memory is None:
                order.memory = self.drawer.fresh()
            for _ in range(min(_PASSES_A_TURN, len(order.frames))):
                order.memory = self.drawer.remember(order.memory, *order.frames.popleft())
        except Exception as error:
            _fail(order.done, error)
            return
        if order.frames:
            self._waiting.append(order)
        else:
            _deliver(order.done, order.memory)

    def _draw_together(self) -> None:
        first = self._waiting[0]
        group = [
            order
            for order in self._waiting
            if isinstance(order, _Draw) and (order.steps, order.lanes) == (first.steps, first.lanes)
        ]
        lanes = first.lanes or self._lanes_for(len(group), first.steps)
        group = group[:lanes]
        self._waiting = [order for order in self._waiting if all(order is not o for o in group)]
        began = self._clock()
        try:
            if lanes not in self.drawer.ready(first.steps):  # a recorded session may ask for it
                self.drawer.compile(first.steps, lanes)
                began = self._clock()
            wanted = [Lane(o.memory, o.action(), o.seed, o.number) for o in group]
            frames = self.drawer.draw(wanted, first.steps, lanes)
            drawn_at = self._clock()
            unsure = [self._unsure(o, lane) for o, lane in zip(group, wanted, strict=True)]
            began += self._clock() - drawn_at  # so that an overlay never costs denoising steps
            memories = [
                self.drawer.remember(lane.memory, frame, lane.action)
                for lane, frame in zip(wanted, frames, strict=True)
            ]  # on its way; the frames go out meanwhile
        except Exception as error:  # the device's, such as out of memory: these players are told
            for order in group:
                _fail(order.done, error)
            return
        program = Program(first.steps, lanes)
        drawn = zip(group, wanted, frames, memories, unsure, strict=True)
        for order, lane, frame, memory, patches in drawn:
            _deliver(order.done, Drawn(frame, lane.action, program, memory, patches))
        jax.block_until_ready(memories)
        self.governor.note(steps=first.steps, seconds=self._clock() - began)

    def _unsure(self, order: _Draw, lane: Lane) -> np.ndarray | None:
        """Of which patches the model is unsure, where that is asked for and compiled."""
        if not order.unsure:
            return None
        self._want(order.steps, None)
        return self.drawer.unsure(lane, order.steps)

    def _lanes_for(self, players: int, steps: int) -> int:
        """The smallest compiled batch that holds them, or the largest there is."""
        ready = self.drawer.ready(steps)
        if not ready:
            self.drawer.compile(steps, 1)
            ready = (1,)
        return next((lanes for lanes in ready if lanes >= players), ready[-1])


def _deliver(done: Future, result: Any) -> None:
    if done.set_running_or_notify_cancel():
        done.set_result(result)


def _fail(done: Future, error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
