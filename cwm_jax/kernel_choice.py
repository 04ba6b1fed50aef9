"""What `config.model.attention=auto` and `config.model.norm=auto` mean in a run: measured.

On an NVIDIA GPU each available kernel computes values and gradients on small arrays, which are
compared with a float32 formula, and is timed forward and backward on the run's own shapes. The
fastest one that is right is taken. Outcomes are kept in `kernels.json` in the folder of compiled
programs. On other devices, and without a run, auto is XLA's.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cwm_jax import attention, compile_cache, files, kernel_trials, kernels, layers, speed
from cwm_jax.errors import UserError, tell
from cwm_jax.kernel_trials import Check, Function, Timing, Trial
from cwm_jax.network import DiTConfig

FILE = "kernels.json"
FALLBACK = "xla"
KERNELS = {"attention": ("xla", "fused", "cudnn"), "norm": ("xla", "triton")}
_COMPILE_SECONDS = 120  # for all programs of a trial; what is not ready then is not taken
_WRONG = "wrong: "  # begins the reason of a candidate that ran, and would do so again

Found = dict[str, float | str]  # of each candidate: milliseconds, or why it cannot be taken


def measured(network: DiTConfig, *, clips: int, frames: int) -> DiTConfig:
    """The network with the kernels that auto means on this device; all processes must call.

    Nothing that fails here ends the run: the kernel that fails is not taken.

    Args:
        clips: that a device goes through at once.
        frames: of a clip.
    """
    if "auto" not in (network.attention, network.norm) or not attention.fuses():
        return network
    outcomes, chosen, reports = _outcomes(network, clips, frames), {}, []
    for setting in KERNELS:
        if getattr(network, setting) == "auto":
            found, remark = outcomes.get(setting, ({}, ""))
            chosen[setting] = fastest(_agreed(setting, found))
            reports.append(f"{setting}={chosen[setting]} ({_listed(found)}{remark})")
    if jax.process_index() == 0:
        device = jax.devices()[0].device_kind
        tell(f"kernels on {device}, forward and backward: {'; '.join(reports)}", file=sys.stdout)
    return dataclasses.replace(network, **chosen)


def fastest(found: Found) -> str:
    """The candidate that takes the least time; XLA's where none has a time."""
    times = {name: value for name, value in found.items() if not isinstance(value, str)}
    return min(times, key=times.get, default=FALLBACK)


def errors(trial: Trial, name: str) -> dict[str, float]:
    """Of a candidate, by the name of the check; NaN where something is not finite."""
    programs, _ = _compile(trial._replace(timings=()), name)
    wanted = [_wanted(check, trial.dtype) for check in trial.checks]
    return dict(_errors(trial, programs, wanted))


def measure(trial: Trial) -> Found:
    """Milliseconds of each candidate that is right, and why each of the others cannot be taken."""
    if len(trial.candidates) == 1:
        return {trial.candidates[0]: 0.0}
    pool = futures.ThreadPoolExecutor(len(trial.candidates))
    try:
        return _measure(trial, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measure(trial: Trial, pool: futures.Executor) -> Found:
    # Compiling tries kernels on the device, which would disturb what is timed: all of it first.
    programs = {name: pool.submit(_compile, trial, name) for name in trial.candidates}
    futures.wait(programs.values(), timeout=_COMPILE_SECONDS)
    wanted = [_wanted(check, trial.dtype) for check in trial.checks]
    found: Found = {}
    for name, compiled in programs.items():
        try:
            checks, timings = compiled.result(timeout=0)
            fault = _fault(trial, checks, wanted)
            found[name] = fault or sum(
                1e3 * _seconds(program, timing, trial.dtype)
                for program, timing in zip(timings, trial.timings, strict=True)
            )
        except Exception as error:  # of any library; the candidate is not taken
            found[name] = _one_line(error)
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
    """What a function returns, and the gradients at its arguments."""
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
    """What is wrong with a candidate's results; None where they are right."""
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
    """Of all arrays of a tree, relative to its root mean square; NaN where one is not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.isfinite(a).all():
            return math.nan
        errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return float(max(errors))


def _seconds(program, timing: Timing, dtype) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in timing.shapes]
    results = jax.eval_shape(timing.make(FALLBACK), *arguments)
    return speed.best_time(program, _random(arguments, dtype), _random(results, dtype), calls=10)


def _random(shapes, dtype):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return tree.unflatten([jax.random.normal(key, leaf.shape, dtype) for key, leaf in pairs])


def _outcomes(network: DiTConfig, clips: int, frames: int) -> dict[str, tuple[Found, str]]:
    """What was found for each setting that is auto, and a remark; nothing of one that failed."""
    outcomes: dict[str, tuple[Found, str]] = {}
    try:
        key, kept = _key(network, clips, frames), _read()
        for trial in kernel_trials.trials(network, clips=clips, frames=frames):
            found = kept.get(key, {}).get(trial.setting)
            if _answers(found, trial):
                outcomes[trial.setting] = found, ", measured before"
                continue
            found = measure(trial)
            outcomes[trial.setting] = found, ""
            if all(map(_is_final, found.values())):
                _keep(key, trial.setting, found)
    except Exception as error:  # a convenience: the run goes on with XLA's kernels
        tell(f"warning: kernels could not be measured: {_one_line(error)}")
    return outcomes


def _agreed(setting: str, found: Found) -> Found:
    """The longest time of any process for each candidate that is right at all of them."""
    if jax.process_count() == 1:
        return found
    names = KERNELS[setting]
    # A process that could not measure rules out all but XLA's.
    times = [found.get(name, 1e9 if name == FALLBACK else math.inf) for name in names]
    mine = np.array([math.inf if isinstance(x, str) else x for x in times], np.float32)
    longest = multihost_utils.process_allgather(mine).max(0)
    return {n: float(x) for n, x in zip(names, longest, strict=True) if math.isfinite(x)}


def _key(network: DiTConfig, clips: int, frames: int) -> str:
    """All that an outcome depends on."""
    device = jax.devices()[0]
    return json.dumps(
        {
            "device": device.device_kind,
            "platform": device.client.platform_version,
            "jax": jax.__version__,
            "code": _code_version(),
            "dtype": network.compute_dtype.name,
            "clips": clips,
            "frames": frames,
            "tokens": network.tokens,
            "hidden_size": network.hidden_size,
            "num_heads": network.num_heads,
        }
    )


def _code_version() -> str:
    """Of the kernels, and of how they are measured."""
    folder = Path(kernels.__file__).parent
    modules = [attention, kernel_trials, layers]
    sources = [*sorted(folder.glob("*.py")), *(Path(module.__file__) for module in modules)]
    text = b"".join(path.read_bytes() for path in [*sources, Path(__file__)])
    return hashlib.sha256(text).hexdigest()[:16]


def _path() -> Path | None:
    folder = compile_cache.folder()
    return folder and folder / FILE


def _read() -> dict[str, dict[str, Found]]:
    """All outcomes that are kept, by key and setting; none where the file is damaged."""
    path = _path()
    try:
        kept = json.loads(path.read_text()) if path and path.exists() else {}
        if not all(isinstance(value, dict) for value in (kept, *kept.values())):
            raise ValueError("it does not hold what was measured")
    except (OSError, ValueError, AttributeError) as error:
        tell(f"warning: {path} cannot be used and is ignored: {_one_line(error)}")
        return {}
    return kept


def _keep(key: str, setting: str, found: Found) -> None:
    path = _path()
    if path is None:
        return
    kept = _read()
    kept[key] = kept.get(key, {}) | {setting: found}
    try:
        with files.written_whole(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")
    except (OSError, UserError) as error:
        tell(f"warning: what was measured of kernels is not kept: {_one_line(error)}")


def _answers(found: object, trial: Trial) -> bool:
    """Whether this is an outcome of the trial."""
    if not isinstance(found, Mapping) or set(found) != set(trial.candidates):
        return False
    return all(isinstance(value, (int, float, str)) for value in found.values())


def _is_final(value: float | str) -> bool:
    """False for an error, which may be gone at the next start."""
    return not isinstance(value, str) or value.startswith(_WRONG)


def _listed(found: Found) -> str:
    if len(found) <= 1:
        return "no other fits" if found else "not measured"
    shown = lambda value: value if isinstance(value, str) else f"{value:.3g} ms"
    return ", ".join(f"{name} {shown(value)}" for name, value in found.items())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
