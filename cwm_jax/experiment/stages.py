"""The stages of a run: training steps whose settings change at given shares of the run."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from cwm_jax.training import train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.examples import Teacher
from cwm_jax.training.train_step import TrainSetup, TrainState


class Stages:
    """Calls `train_step.train_step`; a thread compiles the next stage's step in advance.

    Args:
        stages: for each, the share of the run at which it begins, and its settings. The
            first begins at 0.
        setup: of the first stage.
        teacher: see `train_step.train_step`.
        check: is given each compiled step before it runs, and may raise. Without one, the first
            step is compiled by its call, which shares programs within the process.
    """

    def __init__(
        self,
        stages: Sequence[tuple[float, ExampleConfig]],
        setup: TrainSetup,
        teacher: Teacher | None = None,
        check: Callable[[Any], None] | None = None,
    ):
        self._begins, changed = zip(*stages, strict=True)
        self._setups = [dataclasses.replace(setup, examples=examples) for examples in changed]
        self._teacher, self._check = teacher, check
        self._number, self._update = -1, None
        self._next: Future | None = None
        self._thread = ThreadPoolExecutor(1)

    def update(self, share: float, state: TrainState, batch, key, **traced):
        """One update at this share of the run: (next state, metrics). `state` is donated."""
        number = sum(begin <= share for begin in self._begins) - 1
        if number != self._number:
            self._enter(number, (state, batch, key, traced))
        following, metrics = self._update(state, batch, key, **traced)
        if self._next is None and number + 1 < len(self._setups):
            shapes = jax.tree.map(_abstract, (following, batch, key, traced))
            self._next = self._thread.submit(self._compile, number + 1, *shapes)
        return following, metrics

    def close(self) -> None:
        """Cancels compilations that have not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enter(self, number: int, arguments: tuple) -> None:
        if self._next is not None and number == self._number + 1:
            self._update = self._next.result()
        elif self._check is not None:
            self._update = self._compile(number, *jax.tree.map(_abstract, arguments))
        else:
            self._update = self._jitted(number)
        self._number, self._next = number, None

    def _jitted(self, number: int):
        setup = self._setups[number]
        return lambda *args, **traced: train_step.train_step(
            *args, setup, teacher=self._teacher, **traced
        )

    def _compile(self, number: int, state, batch, key, traced):
        compiled = train_step.train_step.lower(
            state, batch, key, self._setups[number], teacher=self._teacher, **traced
        ).compile()
        if self._check is not None:
            self._check(compiled)
        return lambda *args, **traced: compiled(*args, teacher=self._teacher, **traced)


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
