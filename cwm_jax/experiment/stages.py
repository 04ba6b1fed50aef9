"""The stages of a run: updates whose noise settings change at given shares of the run."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from cwm_jax.training import train_step
from cwm_jax.training.objective import NoiseConfig
from cwm_jax.training.train_step import TrainState


class Stages:
    """Calls `train_step.train_step`; a thread compiles the next stage's during the present one.

    Args:
        noises: of each stage the share of the run with which it begins, and its settings. The
            first begins at 0.
        how: the other keyword arguments of `train_step.train_step` that do not change.
    """

    def __init__(self, noises: Sequence[tuple[float, NoiseConfig]], **how):
        self._begins, self._noises = zip(*noises, strict=True)
        self._how = how
        self._number, self._update = -1, None
        self._next: Future | None = None
        self._thread = ThreadPoolExecutor(1)

    def update(self, share: float, state: TrainState, batch, key, **traced):
        """One update at this share of the run: (next state, metrics). `state` is used up."""
        number = sum(begin <= share for begin in self._begins) - 1
        if number != self._number:
            self._enter(number)
        following, metrics = self._update(state, batch, key, **traced)
        if self._next is None and number + 1 < len(self._noises):
            shapes = jax.tree.map(_abstract, (following, batch, key, traced))
            self._next = self._thread.submit(self._compile, number + 1, *shapes)
        return following, metrics

    def close(self) -> None:
        """Waits for no compilation that has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enter(self, number: int) -> None:
        if self._next is not None and number == self._number + 1:
            self._update = self._next.result()
        else:
            self._update = self._jitted(number)
        self._number, self._next = number, None

    def _jitted(self, number: int):
        noise = self._noises[number]
        return lambda *args, **traced: train_step.train_step(
            *args, noise=noise, **self._how, **traced
        )

    def _compile(self, number: int, state, batch, key, traced):
        lowered = train_step.train_step.lower(
            state, batch, key, noise=self._noises[number], **self._how, **traced
        )
        compiled, teacher = lowered.compile(), self._how["teacher"]
        return lambda *args, **traced: compiled(*args, teacher=teacher, **traced)


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
