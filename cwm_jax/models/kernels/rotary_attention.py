"""Attention with rotary position embedding, from the output of the qkv projection, as one kernel.

The projection's output holds q | k | v of all N heads in each row of 3 · N · K numbers. Its rows
are read, and those of the result written, in place: in an array [R, L, M, 3 · N · K] a sequence has
L rows, with M sequences side by side. So tokens of a frame are [B · T, S, 1, …], and frames at one
token position [B, T, S, …], both without a copy.

One program processes a tile of 64 rows and all scores of a head among them: one sequence, or
several short ones, masked from each other. So the softmax is exact, and the backward pass
recomputes it from q and k: only qkv is stored. The two halves of a head's dimensions, which
rotation mixes (`cwm_jax.models.rope`), are separate operands throughout: a score is the sum of two
products, and nothing is joined or split.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cwm_jax.models.kernels import reference
from cwm_jax.models.kernels.triton_call import triton_call

TILE = 64  # rows; four warps multiply 64 at once
_LEAST = 16  # rows of a sequence in a tile, the multiple that tensor cores take


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is split; the result does not depend on it."""

    heads: int = 1  # that one program processes in turn; num_heads is a multiple of it
    num_warps: int = 4
    num_stages: int = 1
    tile: int = TILE  # rows at most, where sequences are shorter
    whole_q: bool = True  # read whole and split in registers, or read by halves


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile-time parameters of an attention."""

    num_heads: int  # N
    head_size: int  # K
    causal: bool
    forward: Tuning = Tuning()
    backward: Tuning = Tuning()
    interpret: bool = False  # run in Pallas' interpreter, on machines without a GPU

    @property
    def width(self) -> int:
        return self.num_heads * self.head_size


class _Tile(NamedTuple):
    """The sequences of one program, row by row: their first rows, then their second ones, …"""

    rows: int  # of each sequence, a power of 2
    side: int  # sequences, a power of 2
    length: int  # actual rows of each
    places: int  # sequences that lie side by side in memory, M

    @property
    def size(self) -> int:
        return self.rows * self.side

    @property
    def count(self) -> int:
        """Tiles that lie side by side."""
        return self.places // self.side

    @property
    def shift(self) -> int:
        """Row i of a tile is row i >> shift of its sequence."""
        return self.side.bit_length() - 1


def fits(length: int, head_size: int) -> bool:
    """Whether the kernel supports this sequence length and head size."""
    return 1 <= length <= TILE and head_size in (32, 64, 128)


def rotary_attention(qkv_RLMC: jax.Array, cos_LJ: np.ndarray, sin_LJ: np.ndarray, plan: Plan):
    """Attention of each sequence and head → [R, L, M, N · K], in the dtype of qkv.

    Args:
        qkv_RLMC: q | k | v before rotation, [R, L, M, 3 · N · K].
        cos_LJ: of the angles of each position, float32 [L, K/2].
        sin_LJ: likewise.
        plan: sizes, and how the work is split.
    """

    @jax.custom_vjp
    def attend(qkv_RLMC):
        return forward(qkv_RLMC, cos_LJ, sin_LJ, plan)

    attend.defvjp(
        lambda qkv_RLMC: (attend(qkv_RLMC), qkv_RLMC),
        lambda qkv_RLMC, grad_RLMC: (backward(qkv_RLMC, grad_RLMC, cos_LJ, sin_LJ, plan),),
    )
    return attend(qkv_RLMC)


def forward(qkv_RLMC, cos_LJ, sin_LJ, plan: Plan) -> jax.Array:
    """See `rotary_attention`; without gradients."""
    tables = cos_LJ, sin_LJ
    kernel = lambda *arrays: _call(_forward_kernel, plan, plan.forward, plan.width, arrays, tables)
    return _where_it_runs(plan, kernel, _formula(plan, *tables), qkv_RLMC)


def backward(qkv_RLMC, grad_RLMC, cos_LJ, sin_LJ, plan: Plan) -> jax.Array:
    """The gradient of qkv, [R, L, M, 3 · N · K], from that of the result."""
    tables = cos_LJ, sin_LJ
    kernel = lambda *arrays: _call(
        _backward_kernel, plan, plan.backward, 3 * plan.width, arrays, tables
    )
    formula = lambda qkv, grad: jax.vjp(_formula(plan, *tables), qkv)[1](grad)[0]
    return _where_it_runs(plan, kernel, formula, qkv_RLMC, grad_RLMC)


def _formula(plan: Plan, cos_LJ, sin_LJ):
    known = dict(num_heads=plan.num_heads, causal=plan.causal)
    return lambda qkv: reference.rotary_attention(qkv, cos_LJ, sin_LJ, **known)


def _where_it_runs(plan: Plan, kernel, formula, *arrays) -> jax.Array:
    """The kernel on NVIDIA GPUs, or in the interpreter; the formula on other devices."""
    if plan.interpret:
        return kernel(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, default=formula)


def _call(kernel, plan: Plan, tuning: Tuning, width: int, arrays, tables) -> jax.Array:
    """The kernel over all sequences and heads; its result has `width` numbers a row."""
    sequences, length, places, total = arrays[0].shape
    assert total == 3 * plan.width, (total, plan)
    assert fits(length, plan.head_size), (length, plan)
    assert plan.num_heads % tuning.heads == 0, (plan, tuning)
    tile = _tile(length, places, tuning)
    groups = _groups(plan, tuning)  # those of one tile are adjacent in the grid
    flat = lambda array: array.reshape(sequences, -1)
    lane = lambda width: pl.BlockSpec(
        (None, length * places * width), lambda i: (lax.div(i, groups * tile.count), 0)
    )
    table = pl.BlockSpec((tile.size, plan.head_size // 2), lambda i: (0, 0))
    out = triton_call(
        functools.partial(kernel, plan=plan, tuning=tuning, tile=tile),
        out_shape=jax.ShapeDtypeStruct((sequences, length * places * width), arrays[0].dtype),
        grid=(sequences * tile.count * groups,),
        in_specs=[table, table, *(lane(array.shape[-1]) for array in arrays)],
        out_specs=lane(width),
        warps=tuning.num_warps,
        stages=tuning.num_stages,
        interpret=plan.interpret,
        name="rotary_attention" + kernel.__name__.removesuffix("_kernel"),
    )(
        *(_of_tile(table_LJ, tile) for table_LJ in tables),
        *map(flat, arrays),
    )
    return out.reshape(sequences, length, places, width)


def _tile(length: int, places: int, tuning: Tuning) -> _Tile:
    rows = max(_LEAST, 1 << (length - 1).bit_length())
    side = max(1, min(tuning.tile // rows, places & -places))  # a power of 2 that divides places
    return _Tile(rows, side, length, places)


def _of_tile(table_LJ: np.ndarray, tile: _Tile) -> np.ndarray:
    """A row of the table for each row of a tile."""
    padded = np.pad(table_LJ, ((0, tile.rows - tile.length), (0, 0)))
    return np.repeat(padded, tile.side, axis=0)


def _groups(plan: Plan, tuning: Tuning) -> int:
    return plan.num_heads // tuning.heads


def _each_head(plan: Plan, tuning: Tuning, body) -> None:
    """Calls body(head) for the heads of this program."""
    first = lax.rem(pl.program_id(0), _groups(plan, tuning)) * tuning.heads
    if tuning.heads == 1:
        body(first)
    else:
        lax.fori_loop(0, tuning.heads, lambda i, _: body(first + i), None)


def _forward_kernel(cos_ref, sin_ref, qkv_ref, out_ref, *, plan: Plan, tuning: Tuning, tile: _Tile):
    size, width = plan.head_size, plan.width
    rows = _rows(plan, tuning, tile)

    def head(n) -> None:
        k, v = rows.load_kv(qkv_ref, n, plan)
        q = rows.load_q(qkv_ref, n, plan, tuning)
        turn = _load_tables(cos_ref, sin_ref)
        q, k = _turned(q, turn), _turned(k, turn)
        p, of_sum = _weights(q, k, plan, tile)
        rows.store(out_ref, width, n * size, _dot(p.astype(v.dtype), v, (1, 0)) * of_sum)

    _each_head(plan, tuning, head)


def _backward_kernel(
    cos_ref, sin_ref, qkv_ref, grad_ref, out_ref, *, plan: Plan, tuning: Tuning, tile: _Tile
):
    """With p = softmax(s) and g the gradient at p: ds = p · (g − Σ p · g), row by row."""
    size, width = plan.head_size, plan.width
    rows = _rows(plan, tuning, tile)

    def head(n) -> None:
        k, v = rows.load_kv(qkv_ref, n, plan)
        grad = rows.load(grad_ref, width, n * size, size)
        q = rows.load_q(qkv_ref, n, plan, tuning)
        turn = _load_tables(cos_ref, sin_ref)
        q, k = _turned(q, turn), _turned(k, turn)
        p, of_sum = _weights(q, k, plan, tile)
        p = p * of_sum
        store = functools.partial(rows.store, out_ref, 3 * width)
        store(2 * width + n * size, _dot(p.astype(v.dtype), grad, (0, 0)))
        of_p = _dot(grad, v, (1, 1))
        of_s = p * (of_p - (p * of_p).sum(1, keepdims=True)) * size**-0.5
        of_s = of_s.astype(v.dtype)
        turn = _load_tables(
            cos_ref, sin_ref
        )  # loaded again, as their registers are needed meanwhile
        of_q = _turned_back([_dot(of_s, half, (1, 0)) for half in k], turn)
        of_k = _turned_back([_dot(of_s, half, (0, 0)) for half in q], turn)
        for part, halves in enumerate((of_q, of_k)):
            for i, half in enumerate(halves):
                store(part * width + n * size + i * (size // 2), half)

    _each_head(plan, tuning, head)


def _load_tables(cos_ref, sin_ref):
    """Loads tables that every program reads: they should stay in the cache, unlike the rest."""
    return tuple(triton.load(ref, eviction_policy="evict_last") for ref in (cos_ref, sin_ref))


class _Rows(NamedTuple):
    """The positions of a tile's rows in flattened arrays."""

    index: jax.Array  # int32 [size]
    there: jax.Array | None  # bool [size]: which rows are within their sequence; None: all

    def load(self, ref, stride: int, column, width: int):
        """[size, width] from a column on; rows beyond the sequences are 0."""
        part, mask = self._part(ref, stride, column, width)
        other = None if mask is None else 0.0
        return triton.load(part, mask=mask, other=other, eviction_policy="evict_first")

    def load_kv(self, qkv_ref, head, plan: Plan):
        """The halves of k, and v."""
        k, v = (part * plan.width + head * plan.head_size for part in (1, 2))
        halves = self._halves(qkv_ref, k, plan)
        return halves, self.load(qkv_ref, 3 * plan.width, v, plan.head_size)

    def load_q(self, qkv_ref, head, plan: Plan, tuning: Tuning):
        """The halves of q.

        Load it last except for the tables: Triton moves q and these through shared memory as
        soon as they are loaded, and later loads have to wait.
        """
        size, column = plan.head_size, head * plan.head_size
        if not tuning.whole_q:
            return self._halves(qkv_ref, column, plan)
        q = self.load(qkv_ref, 3 * plan.width, column, size)
        return lax.split(q, (size // 2, size // 2), axis=1)

    def _halves(self, qkv_ref, column, plan: Plan):
        half = plan.head_size // 2
        return [self.load(qkv_ref, 3 * plan.width, column + i * half, half) for i in (0, 1)]

    def store(self, ref, stride: int, column, value) -> None:
        part, mask = self._part(ref, stride, column, value.shape[1])
        triton.store(part, value.astype(ref.dtype), mask=mask)

    def _part(self, ref, stride: int, column, width: int):
        shape = self.index.shape[0], width
        spread = lambda x, axis: lax.broadcast_in_dim(x, shape, (axis,))
        columns = column + lax.iota(jnp.int32, width)
        part = ref.at[spread(self.index * stride, 0) + spread(columns, 1)]
        return part, None if self.there is None else spread(self.there, 0)


def _rows(plan: Plan, tuning: Tuning, tile: _Tile) -> _Rows:
    number = lax.rem(lax.div(pl.program_id(0), _groups(plan, tuning)), tile.count)
    i = lax.iota(jnp.int32, tile.size)
    row = i >> tile.shift
    index = row * tile.places + (i & (tile.side - 1)) + number * tile.side
    return _Rows(index, row < tile.length if tile.length < tile.rows else None)


def _turned(halves, turn):
    """`rope.rotate` of a head's two halves, which keep their dtype."""
    (first, second), (cos, sin) = (half.astype(jnp.float32) for half in halves), turn
    turned = first * cos - second * sin, second * cos + first * sin
    return tuple(half.astype(halves[0].dtype) for half in turned)


def _turned_back(halves, turn):
    (first, second), (cos, sin) = halves, turn
    return first * cos + second * sin, second * cos - first * sin


def _weights(q, k, plan: Plan, tile: _Tile):
    """exp(scores − the row's largest), float32 [size, size], and 1 over its sum [size, 1]."""
    scores = _dot(q[0], k[0], (1, 1)) + _dot(q[1], k[1], (1, 1))
    visible = _visible(scores.shape, plan, tile)
    scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    # The largest is subtracted first: rounding would change a score of 250 by 3e-5.
    scores = (scores - scores.max(1, keepdims=True)) * (plan.head_size**-0.5 * math.log2(math.e))
    p = jnp.exp2(scores)
    return p, 1 / p.sum(1, keepdims=True)


def _visible(shape, plan: Plan, tile: _Tile):
    """Which columns a row attends to; None: all. Row i of a tile is of sequence i % side."""
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    earlier, visible = column >> tile.shift, None
    if plan.causal:  # rows beyond the sequence attend beyond it, and are not stored
        visible = earlier <= (row >> tile.shift)
    elif tile.length < tile.rows:
        visible = earlier < tile.length
    if tile.side == 1:
        return visible
    same = ((row ^ column) & (tile.side - 1)) == 0
    return same if visible is None else visible & same


def _dot(a, b, axes: tuple[int, int]):
    """Sum over one axis of each matrix, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)
