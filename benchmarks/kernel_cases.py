"""The kernels other than attention at the shapes of a training step, for `benchmarks.gpu_kernels`.

Each stands beside the program that XLA makes of the same layer, and the textbook formula.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import machine, sizes
from benchmarks.report import Row
from cwm_jax.diffusion import displacement
from cwm_jax.models import dit, kernel_trials, layers
from cwm_jax.models.config import Reach
from cwm_jax.models.kernels import gelu_product, norm, patch_errors

Function = Callable[..., object]  # of arrays, to a tree of arrays

# The first is the default.
FORWARD = [norm.Tiling(*cut) for cut in ((4, 4), (2, 2), (1, 1), (8, 8))]
BACKWARD = [norm.Tiling(*cut) for cut in ((1, 1), (1, 2), (2, 2), (4, 4), (1, 4), (2, 4))]
GELU = [
    *(gelu_product.Tiling(128, 128, *cut) for cut in ((32, 8, 4), (64, 8, 3), (32, 8, 3))),
    gelu_product.Tiling(128, 128, 32, 8, 5),
    gelu_product.Tiling(64, 128, 32, 4, 4),
    gelu_product.Tiling(128, 64, 32, 4, 4),
    gelu_product.Tiling(64, 256, 32, 8, 4),
]


class Case(NamedTuple):
    """A kernel at one shape."""

    kernel: str
    shape: str  # its name
    arguments: Sequence[jax.ShapeDtypeStruct]
    formula: Function  # of arguments in float32
    by_xla: Function
    by_kernel: Function  # also of a tiling, if there are several, and whether to interpret it
    tilings: Sequence[NamedTuple] = ()

    def ways(self, *, interpret: bool) -> Iterator[tuple[Row, Function]]:
        """XLA's program, then the kernel with each tiling."""
        yield {"how": "xla"}, self.by_xla
        kernel = functools.partial(self.by_kernel, interpret=interpret)
        for tiling in self.tilings:
            how = {"how": "kernel", "tiling": machine.described(tiling._asdict())}
            yield how, functools.partial(kernel, tiling=tiling)
        if not self.tilings:
            yield {"how": "kernel"}, kernel


def by_frame(x: jax.Array) -> jax.Array:
    """[B, T, …] → [B · T, …]; a bias [D] stays."""
    return x if x.ndim == 1 else x.reshape(-1, *x.shape[2:])


def norm_by_xla(x, product, bias, gate, shift, scale):
    """The stream [B, T, S, D] with an update, and its norm."""
    return layers.add_and_norm(x, layers.Update(product, bias, gate), shift, scale)


def norm_by_kernel(*arrays, **how):
    """`norm_by_xla` by the kernel."""
    x, product, bias, gate, shift, scale = map(by_frame, arrays)
    return norm.forward(x, (product, bias, gate), shift, scale, **how)


def norm_gradients(normed: Function, x, product, bias, gate, scale, of_normed, of_x):
    """Gradients of stream, product, bias, gate, shift and scale.

    Args:
        normed: the modulated norm, of x, shift and scale.
        x: the stream with the update.
        product, bias, gate, scale: as in the forward pass.
        of_normed, of_x: gradients of the norm, and of the stream from later layers.
    """
    _, pull = jax.vjp(normed, x, jnp.zeros_like(scale), scale)
    of_stream, *of_modulation = pull(of_normed)
    of_stream += of_x
    add = lambda *update: layers.add(jnp.zeros_like(x), layers.Update(*update))
    _, pull = jax.vjp(add, product, bias, gate)
    return of_stream, pull(of_stream), of_modulation


def textbook_norm(x, shift, scale):
    """The modulated norm of x [B, T, S, D] by shift and scale [B, T, D], for autodiff."""
    return kernel_trials.norm_formula(x, 0.0, 0.0, jnp.zeros_like(shift), shift, scale)[1]


def norm_gradients_by_kernel(*arrays, **how):
    """`norm_gradients` by the kernel, with the sum over frames that its caller computes."""
    x, product, bias, gate, *rest = map(by_frame, arrays)
    of_stream, of_product, sums = norm.backward(x, (product, bias, gate), *rest, **how)
    of_shift, of_scale, of_gate, total = sums
    of_bias = (gate.astype(jnp.float32) * total).sum(0)
    return of_stream, (of_product, of_bias, of_gate), (of_shift, of_scale)


def gelu_gradients(product: Function, grad, matrix, x):
    """Gradients of x and of a bias in gelu(x + bias) · matrix."""
    nothing = jnp.zeros(x.shape[-1:], x.dtype)
    return jax.vjp(lambda x, bias: product(x, bias, matrix), x, nothing)[1](grad)


def patch_errors_by_formula(last, target, *, reach: Reach):
    """See `displacement.errors`; without a product, which XLA on GPU would round to TF32."""
    p, edge = reach.patch, ((0, 0), (reach.down,) * 2, (reach.across,) * 2, (0, 0))
    padded = jnp.pad(last, edge, mode="edge")

    def displaced(number):
        down, across = jnp.divmod(number, 2 * reach.across + 1)
        moved = jax.lax.dynamic_slice(padded, (0, down, across, 0), last.shape)
        F, H, W, C = last.shape
        return jnp.square(moved - target).reshape(F, H // p, p, W // p, p, C).sum((2, 4, 5))

    return jnp.moveaxis(jax.lax.map(displaced, jnp.arange(reach.count)), 0, -1)


def of_norm(shape: str, stream: Sequence[int]) -> Case:
    known = _bfloat16(stream, stream, stream[3:], *[_row(stream)] * 3)
    formula = kernel_trials.norm_formula
    return Case("norm", shape, known, formula, norm_by_xla, norm_by_kernel, FORWARD)


def of_norm_backward(shape: str, stream: Sequence[int]) -> Case:
    row, norms = _row(stream), (textbook_norm, layers.modulated_norm)
    known = _bfloat16(stream, stream, stream[3:], row, row, stream, stream)
    plain = [functools.partial(norm_gradients, normed) for normed in norms]
    return Case("norm, backward", shape, known, *plain, norm_gradients_by_kernel, BACKWARD)


def of_gelu_backward(shape: str, stream: Sequence[int]) -> Case:
    rows, size = math.prod(stream[:3]), stream[3]
    known = _bfloat16((rows, size), (dit.MLP_RATIO * size, size), (rows, dit.MLP_RATIO * size))
    products = kernel_trials.mlp_formula, layers.gelu_product
    plain = [functools.partial(gelu_gradients, product) for product in products]
    return Case("gelu, backward", shape, known, *plain, gelu_product.gradient, GELU)


def of_patch_errors(frames: int, side: int, reach: Reach) -> Case:
    """The time of the kernel includes rearranging its operands and its result."""
    known = [jax.ShapeDtypeStruct((frames, side, side, 3), jnp.float32)] * 2
    functions = patch_errors_by_formula, displacement._errors, patch_errors.errors
    ways = [functools.partial(function, reach=reach) for function in functions]
    return Case("patch errors", f"{frames} frames, {reach.count} displacements", known, *ways)


def _row(stream: Sequence[int]) -> tuple[int, ...]:
    """The shape of the modulation of each frame."""
    return *stream[:2], stream[3]


def _bfloat16(*shapes: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def _stream(name: str) -> tuple[int, ...]:
    """[B, T, S, D] of a training step on 128 clips."""
    network = sizes.network(name)
    return 128, network.max_frames, network.tokens, network.hidden_size


def cases(*, tiny: bool) -> Iterator[Case]:
    """All cases, the most important first."""
    streams = {name: _stream(name) for name in ("small", "pocket")}
    few, reaches = (64, 1, *streams["pocket"][2:]), (Reach(8, 4, 4), Reach(12, 12, 4))
    frames, side = 1536, 64
    if tiny:
        streams, few, reaches = {"tiny": (2, 4, 16, 64)}, (2, 1, 16, 64), (Reach(2, 1, 2),)
        frames, side = 2, 16
    for name, stream in streams.items():
        yield of_norm_backward(name, stream)
        yield of_gelu_backward(name, stream)
        yield of_norm(name, stream)
    # As in a rollout of context. So few numbers stay in a card's cache from call to call.
    yield of_norm(f"{few[0]} frames", few)
    for reach in reaches:
        yield of_patch_errors(frames, side, reach)
