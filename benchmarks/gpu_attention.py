"""Attention from qkv to its output on this device: checked, then timed, against XLA's and cuDNN's.

    python -m benchmarks.gpu_attention --output attention.json --seconds 60

First the kernel of `cwm_jax.models.kernels.rotary_attention` against the formula in float32 on the
CPU, on random numbers and on rows with a logsumexp near −150 and +250: values and gradients, of
clips of 1 to 32 frames. Then the seconds of a forward pass, and of a forward and a backward pass,
of every attention at the shapes of `small` and `pocket`, with rotation, split and join. The
kernel is tried with several tunings. Failures are recorded and skipped; the file is rewritten
after each result. `--tiny` tries it all on a CPU, in the interpreter.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, Row, timed
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import attention, rope
from cwm_jax.models.kernels import reference
from cwm_jax.models.kernels import rotary_attention as kernels
from cwm_jax.models.kernels.rotary_attention import Plan, Tuning

# The most important first; the first is the default.
TUNINGS = [
    Tuning(),
    Tuning(whole_q=False),
    Tuning(num_warps=8),
    Tuning(heads=4, num_stages=2),
    Tuning(heads=2),
    Tuning(heads=8, num_stages=2),
    Tuning(heads=2, num_stages=2),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention over clips."""

    over: str  # space or time
    clips: int
    frames: int
    heads: int
    size: int  # of a head
    tokens: int = 64
    network: str = ""

    @property
    def causal(self) -> bool:
        return self.over == "time"

    @property
    def angles(self) -> np.ndarray:
        if self.causal:
            return rope.temporal_angles(np.arange(self.frames), self.size)
        return rope.spatial_angles(round(self.tokens**0.5), self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of qkv, as the projection writes it."""
        return self.clips, self.frames, self.tokens, 3 * self.heads * self.size

    @property
    def least_bytes(self) -> tuple[int, int]:
        """Bytes read and written by a forward pass, and by both passes, in bfloat16."""
        qkv = 2 * int(np.prod(self.shape))
        return qkv * 4 // 3, qkv * 4 // 3 + qkv * 7 // 3

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, T, S, …] as separate sequences, [R, L, M, …]."""
        if self.causal:
            return x
        return x.reshape(-1, self.tokens, 1, x.shape[-1])

    def described(self) -> Row:
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if value}


def fused(case: Case, turn, *, tuning=TUNINGS[0], interpret=False):
    """The kernel, as a function from qkv [B, T, S, 3 · D] to [B, T, S, D]."""
    plan = Plan(case.heads, case.size, case.causal, tuning, tuning, interpret)

    def attend(qkv_BTSC):
        out = kernels.rotary_attention(case.rows(qkv_BTSC), *turn, plan)
        return out.reshape(*qkv_BTSC.shape[:3], -1)

    return attend


def wired(case: Case, name: str):
    """As in the network."""
    along = attention.along_time if case.causal else attention.along_space
    return lambda qkv: along(qkv, case.angles, num_heads=case.heads, implementation=name)


def little_kept(case: Case, turn):
    """The formula whose backward pass keeps only qkv."""
    known = dict(num_heads=case.heads, causal=case.causal)

    def attend(qkv_BTSC):
        rows = case.rows(qkv_BTSC)
        out = reference.rotary_attention_with_little_kept(rows, *turn, **known)
        return out.reshape(*qkv_BTSC.shape[:3], -1)

    return attend


def both(attend):
    """A function that returns the result of `attend`, and the gradient at qkv."""

    def value_and_gradient(qkv, grad):
        out, pull = jax.vjp(attend, qkv)
        return out, pull(grad)[0]

    return value_and_gradient


def numbers(case: Case, *, extreme: bool) -> tuple[np.ndarray, np.ndarray]:
    """qkv and a gradient, normal; or rows whose logsumexp is near −150, 0 and 250, by clip."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    qkv, grad = normal(*case.shape), normal(*case.shape[:3], case.shape[3] // 3)
    if extreme:
        wanted = np.resize([-150.0, 0.0, 250.0], case.clips * case.tokens)
        by_place = wanted.reshape(case.clips, 1, case.tokens, 1)
        by_clip = wanted[: case.clips].reshape(-1, 1, 1, 1)
        q, k, v = np.split(qkv, 3, axis=-1)
        common = (by_place if case.causal else by_clip) / (4 * case.size**0.5)
        qkv = np.concatenate([4 + 0.3 * q, 0.3 * k + common, v], axis=-1)
    return qkv, grad


def turns(case: Case, *, extreme: bool):
    """cos and sin; extreme scores are not rotated, since rounding errors would be large."""
    cos, sin = rope.cos_sin(case.angles)
    return (np.ones_like(cos), np.zeros_like(sin)) if extreme else (cos, sin)


def check(case: Case, tuning: Tuning, *, extreme: bool, interpret: bool) -> Row:
    """Errors relative to the root mean square, and whether they are within the tolerance."""
    turn = turns(case, extreme=extreme)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in numbers(case, extreme=extreme)]
    attend = fused(case, turn, tuning=tuning, interpret=interpret)
    found = jax.jit(both(attend))(*arrays)
    known = dict(num_heads=case.heads, causal=case.causal)

    def formula(qkv):
        out = reference.rotary_attention(case.rows(qkv), *turn, **known)
        return out.reshape(*qkv.shape[:3], -1)

    with jax.default_device(jax.devices("cpu")[0]):
        exact = [jnp.asarray(np.asarray(x, np.float32)) for x in arrays]
        wanted = jax.jit(both(formula))(*exact)
    found, wanted = ([np.asarray(x, np.float32) for x in xs] for xs in (found, wanted))
    error = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    errors = [error(a, b) for a, b in zip(found, wanted, strict=True)]
    finite = all(bool(np.isfinite(x).all()) for x in found)
    near = 5e-2 if extreme else 1e-2
    return {
        "right": finite and max(errors) < near,
        "finite": finite,
        "value_error": errors[0],
        "gradient_error": errors[1],
    }


def checks(*, tiny: bool) -> Iterator[tuple[Case, Tuning, bool]]:
    """Cases, and whether their numbers are extreme; the most important first."""
    tokens, clips = (4, 2) if tiny else (64, 3)
    small = dict(clips=clips, heads=8, size=64, tokens=tokens)
    if tiny:
        small |= dict(heads=2, size=32)
    frames = 4 if tiny else 32
    for extreme in (False, True):
        yield Case("space", frames=frames, **small), Tuning(), extreme
        yield Case("time", frames=frames, **small), Tuning(), extreme
    for frames in (12, 1, 8, 16):
        yield Case("time", frames=frames, **small), Tuning(), False
    yield Case("time", frames=12, **small), Tuning(), True
    yield Case("time", frames=32, **small | dict(size=32)), Tuning(), False
    yield Case("space", frames=5, **small | dict(size=32)), Tuning(), False
    for tuning in TUNINGS[1:]:
        if small["heads"] % tuning.heads == 0:
            yield Case("time", frames=12, **small), tuning, True
            yield Case("space", frames=5, **small), tuning, False


def cut(tuning: Tuning) -> Row:
    return {"heads/warps/stages/tile/whole_q": "/".join(map(str, dataclasses.astuple(tuning)))}


def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile()


class Timing:
    """Programs at one shape: compiled in parallel, then timed in sequence."""

    def __init__(self, report: Report, pool: ThreadPoolExecutor, case: Case, *, interpret: bool):
        self._report, self._pool, self._case = report, pool, case
        self._interpret = interpret
        self._qkv = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16)
        self._grad = jax.ShapeDtypeStruct((*case.shape[:3], case.shape[3] // 3), jnp.bfloat16)
        self._turn = turns(case, extreme=False)
        self._waiting: list[tuple[Row, object, tuple[str, ...], int]] = []

    def ask(self, name: str, attend) -> None:
        """A forward pass, and both passes, of a function from qkv."""
        least = self._case.least_bytes
        self._compile({"how": name, "passes": "forward"}, attend, ("qkv",), least[0])
        self._compile({"how": name, "passes": "both"}, both(attend), ("qkv", "grad"), least[1])

    def ask_tuning(self, tuning: Tuning) -> None:
        """The forward and the backward pass of the kernel on their own."""
        case = self._case
        if case.heads % tuning.heads:
            return
        plan = Plan(case.heads, case.size, case.causal, tuning, tuning, self._interpret)
        first = lambda qkv: kernels.forward(case.rows(qkv), *self._turn, plan)
        second = lambda qkv, grad: kernels.backward(
            case.rows(qkv), case.rows(grad), *self._turn, plan
        )
        least = case.least_bytes
        asked = {"how": "fused"} | cut(tuning)
        self._compile(asked | {"passes": "forward"}, first, ("qkv",), least[0])
        behind = least[1] - least[0]
        self._compile(asked | {"passes": "backward"}, second, ("qkv", "grad"), behind)

    def _compile(self, asked: Row, function, names: tuple[str, ...], least: int) -> None:
        shapes = {"qkv": self._qkv, "grad": self._grad}
        program = self._pool.submit(compiled, function, *(shapes[name] for name in names))
        self._waiting.append((asked, program, names, least))

    def run(self) -> None:
        keys = jax.random.split(jax.random.key(0), 2)
        make = jax.jit(
            lambda key, like: jax.random.normal(key, like.shape, jnp.bfloat16), static_argnums=1
        )
        arrays = {
            name: make(key, like)
            for key, (name, like) in zip(
                keys, (("qkv", self._qkv), ("grad", self._grad)), strict=True
            )
        }
        # Compiling XLA's products runs them on the device, which would disturb timing.
        futures.wait([program for _, program, _, _ in self._waiting], timeout=self._report.left())
        for asked, program, names, least in self._waiting:
            measure = lambda program=program, names=names, least=least: timed(
                program.result(timeout=0), [arrays[name] for name in names], least
            )
            self._report.add("times", self._case.described() | asked, measure)
        self._waiting.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=path_flag, default=Path("attention.json"))
    parser.add_argument(
        "--seconds", type=float, default=60, help="no measurement starts after these"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in the interpreter")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.output, args.seconds)
    sizes = dict(small=(128, 32, 8, 64), pocket=(128, 12, 4, 64))
    if args.tiny:
        sizes = dict(small=(2, 4, 2, 32), pocket=(2, 3, 2, 32))
    cases = [
        Case(over, *sizes[network], tokens=4 if args.tiny else 64, network=network)
        for network in sizes
        for over in ("space", "time")
    ]
    pool = ThreadPoolExecutor(12)
    try:
        measure_all(report, pool, cases, tiny=args.tiny)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"all numbers are in {args.output}")


def measure_all(report: Report, pool: ThreadPoolExecutor, cases: list[Case], *, tiny: bool) -> None:
    timings = [Timing(report, pool, case, interpret=tiny) for case in cases]
    for timing, case in zip(timings, cases, strict=True):
        timing.ask("fused", fused(case, turns(case, extreme=False), interpret=tiny))
    asked = list(checks(tiny=tiny))
    found = [
        pool.submit(check, case, tuning, extreme=extreme, interpret=tiny)
        for case, tuning, extreme in asked
    ]
    for (case, tuning, extreme), result in zip(asked, found, strict=True):
        wait = lambda result=result: result.result(timeout=report.left())
        what = {"extreme": extreme} | cut(tuning)
        report.add("checks", case.described() | what, wait)
    for timing in timings:
        timing.run()
    for timing in timings[:2]:  # of the larger network
        for tuning in TUNINGS:
            timing.ask_tuning(tuning)
    for timing in timings[:2]:
        timing.run()
    for timing, case in zip(timings, cases, strict=True):
        for name in ("xla",) if tiny else ("cudnn", "xla"):
            timing.ask(name, wired(case, name))
        timing.ask("little kept", little_kept(case, turns(case, extreme=False)))
        timing.run()


if __name__ == "__main__":
    with shown_to_user():
        main()
