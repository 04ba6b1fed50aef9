"""Variants of the layers and of the training step on a GPU: time, bytes, errors.

    python -m benchmarks.gpu_pieces --output runs/pieces.json --seconds 90
    python -m benchmarks.gpu_pieces --output /tmp/pieces.json --tiny         (tries it on a CPU)

Every program is lowered first and compiled in threads, the most important first; then each is
timed, forward and backward apart, and compared with float32 on random and on extreme numbers. A
variant that fails is a row with its error. Each result is printed and written at once; after
`--seconds` no measurement starts. Needs jax, flax, optax and numpy; no data.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import hlo, machine, sizes
from benchmarks.train import OPTIM, random_batch
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import attention, dit, layers
from cwm_jax.models.kernels import norm
from cwm_jax.runtime import process_memory
from cwm_jax.training import train_step

BY_LIBRARY = {"xla_gpu_enable_triton_gemm": False}  # products in cuBLAS, with bias and GELU
Patches = tuple[tuple[object, str, object], ...]  # (module, name, replacement)


class Attention(NamedTuple):
    """A choice of attention: fields of the network, and functions to be replaced."""

    fields: dict[str, object]
    patches: Patches = ()


def _always(function: Callable, implementation: str) -> Callable:
    return lambda *qkv, **_: function(*qkv, implementation=implementation)


# Add your own kernels here: fields that choose them, or replacement functions.
ATTENTION_VARIANTS: dict[str, Attention] = {
    "cudnn over space, xla over time": Attention(
        {"attention": "cudnn"}, ((attention, "over_time", _always(attention.over_time, "xla")),)
    ),
    "cudnn": Attention({"attention": "cudnn"}),
    "xla": Attention({"attention": "xla"}),
    "fused": Attention({"attention": "fused"}),
}


class Variant(NamedTuple):
    """One way to compute a piece: function(*arguments) → tuple of arrays."""

    function: Callable
    patches: Patches = ()
    options: dict | None = None


class Piece(NamedTuple):
    """What is computed: variants, the formula in float32, arguments, least bytes to move."""

    name: str
    variants: dict[str, Variant]
    formula: Callable
    arguments: Callable[[str], tuple]  # of "random" or "extreme" numbers
    forward_bytes: int
    backward_bytes: int


class Step(NamedTuple):
    """A training step: fields of the network, replaced functions, options of the compiler."""

    fields: dict[str, object]
    patches: Patches = ()
    options: dict | None = None


# Earlier versions of the layers, for comparison.


@jax.custom_vjp
def old_norm(x, shift, scale):
    return _old_forward(x, shift, scale)[0]


def _old_forward(x, shift, scale):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    y = centred * inverse * (1 + scale[:, :, None]) + shift[:, :, None]
    return y.astype(x.dtype), (x, mean, inverse, shift, scale)


def _old_backward(kept, grad):
    x, mean, inverse, shift, scale = kept
    grad = grad.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    of_normed = grad * (1 + scale[:, :, None])
    along = normed * (of_normed * normed).mean(-1, keepdims=True)
    of_x = inverse * (of_normed - of_normed.mean(-1, keepdims=True) - along)
    of_shift, of_scale = grad.sum(2), (grad * normed).sum(2)
    return of_x.astype(x.dtype), of_shift.astype(shift.dtype), of_scale.astype(scale.dtype)


old_norm.defvjp(_old_forward, _old_backward)


def old_gelu(x):
    return jax.nn.gelu(x, approximate=True)


def old_add_and_norm(x, update, shift, scale, *, kernel="xla"):
    x = layers.add(x, update)
    return x, old_norm(x, shift, scale)


OLD: Patches = (
    (dit, "add_and_norm", old_add_and_norm),
    (layers, "gelu", old_gelu),
    (train_step, "_norm", optax.tree.norm),
)


def tiled(rows: int, warps: int) -> Patches:
    """The kernels of the norm with another tiling."""
    tiling = norm.Tiling(rows, warps)
    return tuple(
        (norm, name, functools.partial(getattr(norm, name), tiling=tiling))
        for name in ("forward", "backward")
    )


@contextlib.contextmanager
def replaced(patches: Patches) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def pieces(clips: int, frames: int, tokens: int, size: int, dtype) -> list[Piece]:
    """The pieces of a half block at these sizes, the most important first."""
    stream, row = (clips, frames, tokens, size), (clips, frames, size)
    one = int(np.prod(stream)) * jnp.dtype(dtype).itemsize  # bytes of the stream
    fused = functools.partial(layers.add_and_norm, kernel="triton")
    gated = lambda function: (
        lambda x, product, bias, gate, shift, scale: function(
            x, layers.Update(product, bias, gate), shift, scale
        )
    )
    alone = lambda function: lambda x, shift, scale: function(x, None, shift, scale)
    tilings = {
        f"triton, {rows} rows, {warps} warps": (rows, warps)
        for rows, warps in ((2, 2), (2, 4), (4, 8), (8, 8))
    }
    norm_variants = lambda shape: {
        "triton": Variant(shape(fused)),
        "xla": Variant(shape(layers.add_and_norm)),
        "old": Variant(shape(old_add_and_norm)),
        **{name: Variant(shape(fused), tiled(*tiling)) for name, tiling in tilings.items()},
    }
    mlp = lambda gelu: lambda x, kernel, bias: (gelu(_product(x, kernel) + bias),)
    arguments = functools.partial(_arguments, dtype=dtype)
    return [
        Piece(
            "add and norm",
            norm_variants(gated),
            gated(_formula),
            functools.partial(arguments, (stream, stream, (size,), row, row, row)),
            4 * one,
            6 * one,
        ),
        Piece(
            "product, bias, GELU",
            {
                "new, by library": Variant(mlp(layers.gelu), (), BY_LIBRARY),
                "new": Variant(mlp(layers.gelu)),
                "old": Variant(mlp(old_gelu)),
            },
            mlp(old_gelu),
            functools.partial(arguments, (stream, (size, 4 * size), (4 * size,))),
            (1 + 8) * one,
            (4 + 8 + 4 + 1 + 1) * one,
        ),
        Piece(
            "norm alone",
            norm_variants(alone),
            alone(_formula),
            functools.partial(arguments, (stream, row, row)),
            2 * one,
            4 * one,
        ),
        Piece(
            "bias, GELU",
            {
                "new": Variant(lambda x, bias: (layers.gelu(x + bias),)),
                "old": Variant(lambda x, bias: (old_gelu(x + bias),)),
            },
            lambda x, bias: (old_gelu(x + bias),),
            functools.partial(arguments, ((*stream[:3], 4 * size), (4 * size,))),
            8 * one,
            12 * one,
        ),
    ]


def attention_pieces(clips: int, frames: int, tokens: int, size: int, heads: int, dtype):
    shape = clips, frames, tokens, heads, size // heads
    one = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    for over in ("over_space", "over_time"):
        plain = functools.partial(getattr(attention, over), implementation="xla")
        variants = {
            name: Variant(
                functools.partial(_attend, over, choice.fields.get("attention", "xla")),
                choice.patches,
            )
            for name, choice in ATTENTION_VARIANTS.items()
            if name != "fused"  # it starts at qkv: see `benchmarks.gpu_attention`
        }
        variants["xla, products by library"] = variants["xla"]._replace(options=BY_LIBRARY)
        yield Piece(
            f"attention {over}",
            variants,
            lambda *qkv, plain=plain: (plain(*qkv),),
            functools.partial(_arguments, (shape,) * 3, dtype=dtype),
            4 * one,
            8 * one,
        )


def _attend(over: str, implementation: str, *qkv):
    """Looked up during tracing, so that replaced functions are used."""
    return (getattr(attention, over)(*qkv, implementation=implementation),)


def _product(x, kernel):
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def _formula(x, update, shift, scale):
    x = layers.add(x, update)
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x, normed * (1 + scale[:, :, None]) + shift[:, :, None]


def _arguments(shapes, kind: str, *, dtype) -> tuple:
    """Normal numbers; or, "extreme", 30 times as large with a far mean and a constant frame."""

    @jax.jit
    def make(seed):
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        found = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        found = [x / np.sqrt(x.shape[0]) if x.ndim == 2 else x for x in found]  # a matrix
        if kind == "extreme":
            found = [30 * x for x in found]
            if found[0].ndim == 4:
                found[0] = (found[0] + 300).at[0, 0].set(7.0)
        return tuple(x.astype(dtype) for x in found)

    return make(0)


def steps() -> dict[str, Step]:
    """Training steps, the most important first."""
    chosen = next(iter(ATTENTION_VARIANTS))
    found = {}

    def want(name: str, kind: str, fields: dict, patches: Patches, options=None) -> None:
        choice = ATTENTION_VARIANTS[kind]
        found[f"{name}; attention {kind}"] = Step(
            choice.fields | fields, choice.patches + patches, options
        )

    want("norm triton, products by library", "fused", {"norm": "triton"}, (), BY_LIBRARY)
    both = {"norm": "triton", "mlp": "triton"}
    want("norm and mlp triton, products by library", "fused", both, (), BY_LIBRARY)
    want("norm triton", "fused", {"norm": "triton"}, ())
    want("old", "cudnn", {"norm": "xla"}, OLD)
    want("norm triton, products by library", chosen, {"norm": "triton"}, (), BY_LIBRARY)
    want("norm xla, products by library", "fused", {"norm": "xla"}, (), BY_LIBRARY)
    want("old", chosen, {"norm": "xla"}, OLD)
    return found


class Bench:
    """Rows of results, the remaining time, and threads that compile."""

    def __init__(self, output: Path, seconds: float, workers: int):
        self.start, self.seconds, self.output = time.monotonic(), seconds, output
        self.pool = concurrent.futures.ThreadPoolExecutor(workers)
        self.futures: list[concurrent.futures.Future] = []
        self.rows: list[dict] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def report(self, **row) -> None:
        self.rows.append({**row, "at_s": time.monotonic() - self.start})
        print(machine.described(self.rows[-1]), flush=True)
        found = {"about": machine.description(), "rows": self.rows}
        self.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def compile(self, lowered, options: dict | None) -> concurrent.futures.Future:
        """(program, seconds), in a thread."""

        def work():
            if self.left < 0:
                raise TimeoutError("no time was left to compile it")
            start = time.perf_counter()
            return lowered.compile(compiler_options=options or {}), time.perf_counter() - start

        self.futures.append(self.pool.submit(work))
        return self.futures[-1]

    def wait(self, share: float) -> None:
        """Waits for all or until this share of the time is over: compiling disturbs timing."""
        timeout = max(0.0, self.left - (1 - share) * self.seconds)
        concurrent.futures.wait(self.futures, timeout=timeout)
        dropped = sum(future.cancel() for future in self.futures)
        self.report(part="compiled", dropped=dropped, compiling=self.compiling)

    @property
    def compiling(self) -> int:
        return sum(not future.done() for future in self.futures)

    @contextlib.contextmanager
    def isolated(self, **row) -> Iterator[None]:
        """A failure becomes a row, and the next variant follows."""
        try:
            yield
        except Exception as error:  # any error of a compiler or a device
            text = f"{type(error).__name__}: {error}"
            self.report(**row, error=text[:600])


class Compiled(NamedTuple):
    """Forward with its residuals, and backward, of a variant of a piece; both being compiled."""

    forward: concurrent.futures.Future
    backward: concurrent.futures.Future


def lower_piece(bench: Bench, piece: Piece, variant: Variant) -> Compiled:
    """Compiles arguments → (results, kept) and (arguments, results, kept, gradients) → gradients.

    As in a step; residuals that are arguments or results already are not copied.
    """
    shapes = jax.eval_shape(lambda: piece.arguments("random"))
    how = []

    def forward_and_kept(*args):
        results, pull = jax.vjp(variant.function, *args)
        leaves, tree = jax.tree.flatten(pull)
        known = [*args, *results]
        places = [next((i for i, x in enumerate(known) if x is leaf), None) for leaf in leaves]
        how.append((tree, places))
        return results, [leaf for leaf, i in zip(leaves, places, strict=True) if i is None]

    def pull(args, results, kept, grads):
        (tree, places), known, kept = how[0], [*args, *results], iter(kept)
        leaves = [next(kept) if i is None else known[i] for i in places]
        return jax.tree.unflatten(tree, leaves)(grads)

    jax.clear_caches()  # a replaced function must be traced again
    with replaced(variant.patches):
        forward = jax.jit(forward_and_kept).lower(*shapes)
        results, kept = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), forward.out_info
        )
        # An unused argument would be dropped, and then rejected at the call.
        backward = jax.jit(pull, keep_unused=True).lower(shapes, results, kept, results)
    return Compiled(
        bench.compile(forward, variant.options), bench.compile(backward, variant.options)
    )


def seconds_of(function: Callable, repeats: int) -> float:
    """Median over 5 rounds of back-to-back calls, with a wait after each round."""
    jax.block_until_ready(function())
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            last = function()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / repeats)
    return float(np.median(found))


def measure_piece(
    bench: Bench, piece: Piece, name: str, compiled: Compiled, cases: dict, repeats: int
) -> None:
    """`cases` are (arguments, results and gradients in float32) by the kind of their numbers."""
    forward, forward_s = compiled.forward.result(timeout=max(bench.left, 1))
    backward, backward_s = compiled.backward.result(timeout=max(bench.left, 1))
    arguments, _ = cases["random"]
    results, kept = forward(*arguments)
    row = {"compiling": bench.compiling}
    for way, function, least in (
        ("forward", lambda: forward(*arguments), piece.forward_bytes),
        ("backward", lambda: backward(arguments, results, kept, results), piece.backward_bytes),
    ):
        seconds = seconds_of(function, repeats)
        row |= {f"{way}_ms": 1e3 * seconds, f"{way}_gb_s": least / 1e9 / seconds}
    for way, program in (("forward", forward), ("backward", backward)):
        found = hlo.kernels(program.as_text())
        row |= {f"{way}_gb": found.total_bytes / 1e9, f"{way}_kernels": found.total_count}
    for kind, (arguments, wanted) in cases.items():
        results, kept = forward(*arguments)
        # The same gradients for all variants: the results of the formula.
        rounded = jax.tree.map(lambda a, b: a.astype(b.dtype), wanted[0], results)
        grads = backward(arguments, results, kept, rounded)
        for way, found, right in zip(("", "_grad"), (results, grads), wanted, strict=True):
            error, finite = _errors(found, right)
            row |= {f"{kind}{way}_error": float(error), f"{kind}{way}_finite": bool(finite)}
    bench.report(piece=piece.name, variant=name, **row, compile_s=forward_s + backward_s)


@jax.jit
def _errors(found, wanted):
    """Largest difference over (|wanted| + its root mean square); whether all is finite."""

    def worst(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.max(jnp.abs(a - b) / (jnp.abs(b) + jnp.sqrt(jnp.square(b).mean()) + 1e-30))

    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    finite = jnp.array([jnp.isfinite(x).all() for x in found]).all()
    return jnp.array([worst(a, b) for a, b in zip(found, wanted, strict=True)]).max(), finite


def exact(piece: Piece) -> Callable:
    """Arguments → results of the formula in float32, and its gradients at these results."""

    def compute(arguments):
        wide = [x.astype(jnp.float32) for x in arguments]
        with jax.default_matmul_precision("highest"):
            results, pull = jax.vjp(piece.formula, *wide)
            rounded = jax.tree.map(lambda x: x.astype(arguments[0].dtype), results)
            return results, pull(jax.tree.map(lambda x: x.astype(jnp.float32), rounded))

    return jax.jit(compute)


def run_piece(bench: Bench, piece: Piece, compiled: dict[str, Compiled], repeats: int) -> None:
    if bench.left < 0:
        return
    cases = {}
    with bench.isolated(piece=piece.name, variant="float32 formula"):
        formula = exact(piece)
        for kind in ("random", "extreme"):
            arguments = piece.arguments(kind)
            cases[kind] = arguments, formula(arguments)
    for name, programs in compiled.items():
        if bench.left > 0 and cases:
            with bench.isolated(piece=piece.name, variant=name):
                measure_piece(bench, piece, name, programs, cases, repeats)


def abstract_state(network) -> train_step.TrainState:
    return jax.eval_shape(lambda: train_step.init_state(network, OPTIM, 0))


def fill(shapes):
    """Arrays of these shapes without a program for each: small random numbers, moments zero."""
    small = 0.02 * np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    params = {n: jax.device_put(np.resize(small, x.shape)) for n, x in shapes.params.items()}
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes)
    return zeros._replace(params=params)


def lower_step(bench: Bench, network, step: Step, batch) -> concurrent.futures.Future:
    jax.clear_caches()
    network = dataclasses.replace(network, **step.fields)
    with replaced(step.patches):
        setup = train_step.TrainSetup(network=network, optim=OPTIM)
        lowered = train_step.train_step.lower(
            abstract_state(network), batch, jax.random.key(0), setup
        )
    return bench.compile(lowered, step.options)


def measure_step(bench: Bench, name: str, network, compiled, batch, repeats: int) -> None:
    program, compile_s = compiled.result(timeout=max(bench.left, 1))
    compiling = bench.compiling
    key, state = jax.random.key(0), fill(abstract_state(network))
    state, metrics = program(state, batch, key)
    first = {n: float(metrics[f"train/{n}"]) for n in ("loss", "grad_norm")}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, metrics = program(state, batch, key)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    found = hlo.kernels(program.as_text())
    bench.report(
        step=name,
        step_ms=1e3 * float(np.median(times)),
        best_ms=1e3 * min(times),
        gb=found.total_bytes / 1e9,
        kernels=found.total_count,
        working_gb=program.memory_analysis().temp_size_in_bytes / 1e9,
        **first,
        compiling=compiling,
        compile_s=compile_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=path_flag, required=True)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--workers", type=int, default=8, help="threads that compile")
    parser.add_argument("--steps", type=int, default=6, help="variants of the training step")
    parser.add_argument("--only", choices=("pieces", "steps"), help="only these")
    parser.add_argument("--tiny", action="store_true", help="small shapes, kernels interpreted")
    args = parser.parse_args()
    process_memory.claim_gpu()
    process_memory.schedule_for_memory()
    bench = Bench(args.output, args.seconds, args.workers)
    interpreted: Patches = ()
    network = dataclasses.replace(sizes.network("small", dtype="bfloat16"), norm="xla")
    clips, frames, repeats = args.clips, 32, 20
    if args.tiny:
        network = dataclasses.replace(network, hidden_size=64, depth=1, num_heads=1)
        call = functools.partial(_interpreted, norm._call)
        clips, frames, repeats, interpreted = 2, 4, 1, ((norm, "_call", call),)
    with replaced(interpreted):
        chosen = {} if args.only == "pieces" else dict(list(steps().items())[: args.steps])
        run(bench, network, clips, frames, repeats, chosen, args.only != "steps")
    os._exit(0)  # threads may still be compiling


def _interpreted(call, *args):
    *most, _, name = args
    return call(*most, True, name)


def run(
    bench: Bench,
    network,
    clips: int,
    frames: int,
    repeats: int,
    all_steps: dict[str, Step],
    with_pieces: bool,
) -> None:
    dtype = network.compute_dtype
    shape = clips, frames, network.tokens, network.hidden_size
    batch = jax.device_put(random_batch(clips, frames))
    wanted = pieces(*shape, dtype) if with_pieces else []
    late = list(attention_pieces(*shape, network.num_heads, dtype)) if with_pieces else []
    step_programs, piece_programs = {}, {}

    def lower(piece: Piece) -> None:
        piece_programs[piece.name] = {}
        for name, variant in piece.variants.items():
            with bench.isolated(piece=piece.name, variant=name):
                piece_programs[piece.name][name] = lower_piece(bench, piece, variant)

    def lower_steps(some: dict[str, Step]) -> None:
        for name, step in some.items():
            with bench.isolated(step=name):
                step_programs[name] = lower_step(bench, network, step, batch)

    names = list(all_steps)
    lower_steps({name: all_steps[name] for name in names[:2]})
    for piece in wanted[:2]:
        lower(piece)
    lower_steps({name: all_steps[name] for name in names[2:]})
    for piece in wanted[2:] + late:
        lower(piece)
    bench.report(part="lowered", programs=len(bench.futures))
    bench.wait(0.55)
    # Those not compiled yet are last.
    names = sorted(step_programs, key=lambda name: not step_programs[name].done())
    for name in names[:1]:
        time_step(bench, name, network, step_programs, batch, repeats)
    for piece in wanted[:2]:
        run_piece(bench, piece, piece_programs[piece.name], repeats)
    for name in names[1:]:
        time_step(bench, name, network, step_programs, batch, repeats)
    for piece in wanted[2:] + late:
        run_piece(bench, piece, piece_programs[piece.name], repeats)
    bench.report(part="end", left_s=bench.left)


def time_step(bench: Bench, name, network, programs, batch, repeats: int) -> None:
    if bench.left > 0:
        with bench.isolated(step=name):
            measure_step(bench, name, network, programs[name], batch, max(2, repeats // 3))


if __name__ == "__main__":
    with shown_to_user():
        main()
