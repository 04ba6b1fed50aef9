"""Checks and times the candidates of a trial on this machine's device."""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.models.kernel_trials import Check, Function, Timing, Trial
from cwm_jax.runtime import device_speed

_COMPILE_SECONDS = 120  # for all programs of a trial; slower ones are not chosen
_WRONG = "wrong: "  # prefix of a reason that holds for every run, unlike an error

Found = dict[str, float | str]  # of each candidate: milliseconds, or why it cannot be chosen


def errors(trial: Trial, name: str) -> dict[str, float]:
    """Errors of a candidate by the name of the check; NaN where something is not finite."""
    programs, _ = _compile(trial._replace(timings=()), name)
    wanted = [_wanted(check, trial.dtype) for check in trial.checks]
    return dict(_errors(trial, programs, wanted))


def measure(trial: Trial) -> Found:
    """Milliseconds of each correct candidate, and why each of the others cannot be chosen."""
    if len(trial.candidates) == 1:
        return {trial.candidates[0]: 0.0}
    pool = futures.ThreadPoolExecutor(len(trial.candidates))
    try:
        return _measure(trial, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measure(trial: Trial, pool: futures.Executor) -> Found:
    # Compilation also runs kernels on the device, which would disturb timings: all of it first.
    programs = {name: pool.submit(_compile, trial, name) for name in trial.candidates}
    futures.wait(programs.values(), timeout=_COMPILE_SECONDS)
    wanted = [_wanted(check, trial.dtype) for check in trial.checks]
    found: Found = {}
    for name, compiled in programs.items():
        try:
            checks, timings = compiled.result(timeout=0)
            fault = _fault(trial, checks, wanted)
            found[name] = fault or sum(
                1e3 * _seconds(program, timing.make(name), timing, trial.dtype)
                for program, timing in zip(timings, trial.timings, strict=True)
            )
        except Exception as error:  # of any library; the candidate is not chosen
            found[name] = one_line(error)
    return found


def _compile(trial: Trial, name: str):
    """The compiled programs of a candidate: those of the checks, and those that are timed."""
    shapes = lambda check: [array.shape for array in check.arrays]
    checks = [_compiled(check.make(name), shapes(check), trial.dtype) for check in trial.checks]
    timings = [_compiled(timing.make(name), timing.shapes, trial.dtype) for timing in trial.timings]
    return checks, timings


def _compiled(function: Function, shapes: Sequence[tuple[int, ...]], dtype):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    results = jax.eval_shape(function, *arguments)
    return jax.jit(functools.partial(_both, function)).lower(arguments, results).compile()


def _both(function: Function, arguments, grads):
    """The results of a function, and the gradients of its arguments."""
    results, pull = jax.vjp(function, *arguments)
    return results, pull(grads)


def _wanted(check: Check, dtype):
    """Arguments and gradients of a check, and the values and gradients of its formula."""
    arguments = [jnp.asarray(array, dtype) for array in check.arrays]
    exact = [array.astype(jnp.float32) for array in arguments]
    shapes = jax.eval_shape(check.formula, *exact)
    grads = _random(shapes, dtype)
    exact_grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    both = jax.jit(functools.partial(_both, check.formula))(exact, exact_grads)
    return arguments, grads, jax.device_get(both)


def _fault(trial: Trial, programs, wanted) -> str | None:
    """The fault of a candidate's results; None where they are correct."""
    found = _errors(trial, programs, wanted)
    for check, (name, error) in zip(trial.checks, found, strict=True):
        if not error <= check.near:
            what = "not finite" if math.isnan(error) else f"off by {error:.2g}"
            return f"{_WRONG}{what} on {name}"
    return None


def _errors(trial: Trial, programs, wanted) -> Iterator[tuple[str, float]]:
    for check, program, (arguments, grads, exact) in zip(
        trial.checks, programs, wanted, strict=True
    ):
        found = jax.device_get(program(arguments, grads))
        yield check.name, largest_error(found, exact)


def largest_error(found, wanted) -> float:
    """The largest error of the arrays of a tree, relative to its norm; NaN if not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.isfinite(a).all():
            return math.nan
        errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return float(max(errors))


def _seconds(program, function: Function, timing: Timing, dtype) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in timing.shapes]
    results = jax.eval_shape(function, *arguments)
    return device_speed.best_time(
        program, _random(arguments, dtype), _random(results, dtype), calls=10
    )


def _random(shapes, dtype):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return tree.unflatten([jax.random.normal(key, leaf.shape, dtype) for key, leaf in pairs])


def is_final(value: float | str) -> bool:
    """False for an error, which may not occur at the next start of a run."""
    return not isinstance(value, str) or value.startswith(_WRONG)


def one_line(error: Exception) -> str:
    """An error in at most 160 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
