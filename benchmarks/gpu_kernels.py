"""The kernels other than attention on this device: checked, and timed with several tilings.

    python -m benchmarks.gpu_kernels --output kernels.json --seconds 60

The norm forward and backward and the gradient of GELU and product at the shapes of `small` and
`pocket`, and the errors of displacements. XLA's program and the kernel with each tiling are a row:
the largest error against the textbook formula in float32, then the time, and the rate at which each
operand is read and each result written once, beside that of a large copy. Failures are recorded and
skipped; the file is rewritten after each row; a table of the fastest ends the output. `--tiny`
tries it all on a CPU, in the interpreter. `benchmarks.gpu_attention` has the kernel of attention.
"""

import argparse
import functools
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import kernel_cases, machine
from benchmarks.kernel_cases import Case, Function
from benchmarks.report import Report, Row, timed
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.runtime import device_speed

NEAR = {"bfloat16": 2e-2, "float32": 1e-4}  # largest error of a kernel


def largest_error(found: list[jax.Array], wanted: list[jax.Array]) -> jax.Array:
    """The largest |difference| / (|wanted| + its root mean square), of all arrays.

    Infinite if a number is not finite. A norm of all differences would hide a wrong tile among
    thousands.
    """

    def worst(a, b):
        error = jnp.abs(a.astype(jnp.float32) - b)
        error /= jnp.abs(b) + jnp.sqrt(jnp.square(b).mean()) + 1e-30
        # XLA's largest of numbers on a CPU may leave out those that are NaN.
        return jnp.max(jnp.where(jnp.isfinite(error), error, jnp.inf))

    return jnp.stack([worst(a, b) for a, b in zip(found, wanted, strict=True)]).max()


class Programs:
    """The programs of a case, compiled in the threads of a pool."""

    def __init__(self, case: Case, report: Report, pool: ThreadPoolExecutor, *, interpret: bool):
        self._case, self._report = case, report
        results = jax.tree.leaves(jax.eval_shape(case.by_xla, *case.arguments))
        self._least_bytes = sum(x.size * x.dtype.itemsize for x in (*case.arguments, *results))

        def compiled(function: Function, *shapes) -> futures.Future:
            return pool.submit(lambda: jax.jit(function).lower(*shapes).compile())

        def random_arrays(seed):
            keys = jax.random.split(jax.random.key(seed), len(case.arguments))
            normal = lambda key, like: jax.random.normal(key, like.shape, like.dtype)
            return list(map(normal, keys, case.arguments))

        def alike(function: Function, *arrays):
            """The results in the shapes and dtypes of XLA's, for one program to compare."""
            like = zip(jax.tree.leaves(function(*arrays)), results, strict=True)
            return [found.reshape(x.shape).astype(x.dtype) for found, x in like]

        def exact(*arrays):
            return jax.tree.leaves(case.formula(*(x.astype(jnp.float32) for x in arrays)))

        self._ways = [
            (how, compiled(functools.partial(alike, function), *case.arguments))
            for how, function in case.ways(interpret=interpret)
        ]
        self._random_arrays = compiled(random_arrays, 0)
        self._exact = compiled(exact, *case.arguments)
        wanted = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in results]
        self._compare = compiled(largest_error, results, wanted)
        self.all = [program for _, program in self._ways]
        self.all += [self._random_arrays, self._exact, self._compare]

    def run(self, copy_gb_s: float | None) -> None:
        """A row for each way, beside the rate of a large copy if that is known."""
        numbers = functools.cache(self._numbers)
        for how, program in self._ways:
            row = {"kernel": self._case.kernel, "shape": self._case.shape} | how
            measure = functools.partial(self._measure, how["how"], program, numbers, copy_gb_s)
            self._report.add("kernels", row, measure)

    def _numbers(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Operands, and the results of the formula.

        Each operand is an array of its own: one that is read several times comes from the cache.
        """
        arrays = self._ready(self._random_arrays)(0)
        return arrays, self._ready(self._exact)(*arrays)

    def _measure(self, how: str, program: futures.Future, numbers, copy_gb_s) -> Row:
        program, (arrays, wanted) = self._ready(program), numbers()
        error = float(self._ready(self._compare)(program(*arrays), wanted))
        # XLA rounds between operations, so its error is no fault.
        right = {} if how == "xla" else {"right": error < NEAR[arrays[0].dtype.name]}
        found = {"error": error} | timed(program, arrays, self._least_bytes)
        return right | found | ({"of_copy": found["gb_s"] / copy_gb_s} if copy_gb_s else {})

    def _ready(self, program: futures.Future):
        return program.result(timeout=self._report.left())


def measure_all(report: Report, pool: ThreadPoolExecutor, *, tiny: bool) -> None:
    asked = [Programs(case, report, pool, interpret=tiny) for case in kernel_cases.cases(tiny=tiny)]
    # Compiling XLA's products runs them on the device, which would disturb timing.
    waiting = [program for programs in asked for program in programs.all]
    late = futures.wait(waiting, timeout=report.left() / 2).not_done
    copy = lambda: {"copy_gb_s": device_speed.copy_bytes() / 1e9}
    found = report.add("machine", {"still_compiling": len(late)}, copy)
    for programs in asked:
        programs.run(found.get("copy_gb_s"))


def fastest(rows: list[Row]) -> list[Row]:
    """The fastest way of each case that is not wrong."""
    best: dict[tuple, Row] = {}
    right = [row for row in rows if row.get("right", "ms" in row)]
    for row in sorted(right, key=lambda row: row["ms"]):
        best.setdefault((row["kernel"], row["shape"]), row)
    return list(best.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=path_flag, default=Path("kernels.json"))
    parser.add_argument(
        "--seconds", type=float, default=60, help="no measurement starts after these"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in the interpreter")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report, pool = Report(args.output, args.seconds), ThreadPoolExecutor(12)
    try:
        measure_all(report, pool, tiny=args.tiny)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    rows = report.rows["kernels"]
    columns = ("kernel", "shape", "how", "tiling", "error", "ms", "gb_s", "of_copy")
    if best := fastest(rows):
        print(machine.table(best, columns))
    failed = sum("failed" in row for row in rows)
    wrong = sum(row.get("right") is False for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {wrong} wrong; all numbers are in {args.output}")


if __name__ == "__main__":
    with shown_to_user():
        main()
