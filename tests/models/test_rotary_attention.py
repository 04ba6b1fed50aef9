"""The kernels, in the interpreter of Pallas, against the plain formulas: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.models import attention, rope
from cwm_jax.models.kernels import reference
from cwm_jax.models.kernels.rotary_attention import Plan, Tuning, rotary_attention

HEADS = 2
NEAR = {"float32": 1e-5, "bfloat16": 1e-2}  # of the root mean square


def plan(size: int, *, causal: bool, **changes) -> Plan:
    return Plan(num_heads=HEADS, head_size=size, causal=causal, interpret=True, **changes)


def numbers(shape, dtype: str):
    """qkv [R, L, M, 3 · N · K], and the gradient at the result, for a shape [R, L, M, K]."""
    keys = jax.random.split(jax.random.key(1), 2)
    *rows, size = shape
    qkv = jax.random.normal(keys[0], (*rows, 3 * HEADS * size), dtype)
    return qkv, jax.random.normal(keys[1], (*rows, HEADS * size), dtype)


def angles(length: int, size: int, *, causal: bool):
    """Of the frames of a clip, or of the tokens of a frame."""
    if causal:
        return rope.temporal_angles(np.arange(length), size)
    return rope.spatial_angles(round(length**0.5), size)


def both(attend, qkv, grad):
    """The result of a function of qkv, and its gradient."""

    @jax.jit
    def value_and_gradient(qkv, grad):
        out, pull = jax.vjp(attend, qkv)
        return out, *pull(grad)

    found = value_and_gradient(qkv, grad)
    assert {x.dtype for x in found} == {qkv.dtype}
    return [np.asarray(x, np.float64) for x in found]


def of_kernel(plan: Plan, turn, qkv, grad):
    return both(lambda qkv: rotary_attention(qkv, *turn, plan), qkv, grad)


def of_formula(plan: Plan, turn, qkv, grad, function=reference.rotary_attention):
    known = dict(num_heads=plan.num_heads, causal=plan.causal)
    return both(lambda qkv: function(qkv, *turn, **known), qkv, grad)


def exact(plan: Plan, turn, qkv, grad):
    """The same by hand, in float64."""
    qkv, grad = (np.asarray(x.astype(jnp.float32), np.float64) for x in (qkv, grad))
    parts = qkv.reshape(*qkv.shape[:3], 3, plan.num_heads, -1)
    rotate = lambda x, sin: np.concatenate(
        [
            x[..., : x.shape[-1] // 2] * cos - x[..., x.shape[-1] // 2 :] * sin,
            x[..., x.shape[-1] // 2 :] * cos + x[..., : x.shape[-1] // 2] * sin,
        ],
        axis=-1,
    )
    cos, sin = (table[:, None, None].astype(np.float64) for table in turn)
    q, k, v = (
        rotate(parts[..., 0, :, :], sin),
        rotate(parts[..., 1, :, :], sin),
        parts[..., 2, :, :],
    )
    scale, length = plan.head_size**-0.5, qkv.shape[1]
    scores = np.einsum("rlmnk,rcmnk->rmnlc", q, k) * scale
    scores[
        ..., ~np.tri(length, dtype=bool) if plan.causal else np.zeros((length,) * 2, bool)
    ] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    grad = grad.reshape(v.shape)
    of_p = np.einsum("rlmnk,rcmnk->rmnlc", grad, v)
    of_s = p * (of_p - (p * of_p).sum(-1, keepdims=True)) * scale
    of_q = rotate(np.einsum("rmnlc,rcmnk->rlmnk", of_s, k), -sin)
    of_k = rotate(np.einsum("rmnlc,rlmnk->rcmnk", of_s, q), -sin)
    of_v = np.einsum("rmnlc,rlmnk->rcmnk", p, grad)
    out = np.einsum("rmnlc,rcmnk->rlmnk", p, v)
    return out.reshape(*qkv.shape[:3], -1), np.stack([of_q, of_k, of_v], 3).reshape(qkv.shape)


def errors(found, wanted) -> np.ndarray:
    """Of a value and of a gradient, relative to their root mean square."""
    pairs = zip(found, wanted, strict=True)
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


def compare(shape, plan: Plan, dtype: str) -> None:
    turn = rope.cos_sin(angles(shape[1], plan.head_size, causal=plan.causal))
    arrays = numbers(shape, dtype)
    found = of_kernel(plan, turn, *arrays)
    assert (errors(found, exact(plan, turn, *arrays)) < NEAR[dtype]).all()


@pytest.mark.parametrize(
    ("frames", "size", "dtype"),
    [
        *((frames, 32, "float32") for frames in (1, 8, 16, 32)),
        (12, 64, "float32"),
        (12, 64, "bfloat16"),
    ],
)
def test_attention_over_time(frames, size, dtype):
    compare((3, frames, 4, size), plan(size, causal=True), dtype)


@pytest.mark.parametrize(
    ("tokens", "size", "dtype"), [(64, 64, "float32"), (64, 64, "bfloat16"), (9, 32, "float32")]
)
def test_attention_over_space(tokens, size, dtype):
    compare((3, tokens, 1, size), plan(size, causal=False), dtype)


@pytest.mark.parametrize("places", [1, 6])
def test_any_number_of_sequences_side_by_side(places):
    compare((2, 12, places, 32), plan(32, causal=True), "float32")


@pytest.mark.parametrize("tuning", [Tuning(heads=2), Tuning(tile=16), Tuning(whole_q=False)])
def test_the_result_does_not_depend_on_the_tuning(tuning):
    compare((2, 8, 4, 32), plan(32, causal=True, forward=tuning, backward=tuning), "float32")


def extreme(length: int, dtype: str, *, causal: bool):
    """Three sequences side by side whose rows have a logsumexp near −150, 0 and +250.

    Position turns nothing here: rounded after a turn, such scores would be off by more than 1.
    """
    size, places = 64, 3
    qkv, grad = numbers((2, length, places, size), dtype)
    width = HEADS * size
    wanted = np.repeat([-150.0, 0.0, 250.0], width).reshape(places, width)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q, k = 4 + 0.3 * q, 0.3 * k + jnp.asarray(wanted / (4 * size**0.5), dtype)
    turn = np.ones((length, size // 2), np.float32), np.zeros((length, size // 2), np.float32)
    return plan(size, causal=causal), turn, jnp.concatenate([q, k, v], axis=-1), grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("length", "causal"), [(12, True), (64, False)])
def test_rows_of_extreme_scores_stay_finite_and_right(length, causal, dtype):
    case = extreme(length, dtype, causal=causal)
    found, wanted = of_kernel(*case), exact(*case)
    assert all(np.isfinite(x).all() for x in found)
    # All k have a large part in common, which adds only rounding errors to the gradient of q.
    near = {"float32": 1e-4, "bfloat16": 5e-2}  # a score of 250 is rounded to 2e-5 in float32
    assert (errors(found, wanted) < near[dtype]).all()


def test_the_extreme_rows_are_extreme():
    known, _, qkv, _ = extreme(64, "float32", causal=False)
    q, k, _ = np.moveaxis(np.asarray(qkv).reshape(2, 64, 3, 3, HEADS, 64), 3, 0)
    scores = np.einsum("rlmnk,rcmnk->rmnlc", q, k) / known.head_size**0.5
    found = jax.nn.logsumexp(scores, axis=-1).mean((0, 2, 3))
    np.testing.assert_allclose(found, [-150, 0, 250], atol=10)


@pytest.mark.parametrize(
    "function",
    [reference.rotary_attention, reference.rotary_attention_with_little_kept],
)
def test_the_formulas_for_any_device(function):
    known, turn = plan(32, causal=True), rope.cos_sin(angles(12, 32, causal=True))
    arrays = numbers((2, 12, 3, 32), "float32")
    found = of_formula(known, turn, *arrays, function)
    assert (errors(found, exact(known, turn, *arrays)) < 1e-6).all()


def test_attention_over_time_is_causal():
    """By gradient: the first frames of the result depend on the first frames of qkv alone."""
    known, turn = plan(32, causal=True), rope.cos_sin(angles(12, 32, causal=True))
    qkv, grad = numbers((1, 12, 2, 32), "float32")
    _, of_qkv = of_kernel(known, turn, qkv, grad.at[:, 5:].set(0))
    assert (of_qkv[:, 5:] == 0).all()
    assert (of_qkv[:, :5] != 0).any()


def test_sequences_side_by_side_are_independent():
    known, turn = plan(32, causal=True), rope.cos_sin(angles(8, 32, causal=True))
    qkv, grad = numbers((1, 8, 4, 32), "float32")
    _, of_qkv = of_kernel(known, turn, qkv, grad.at[:, :, 1:].set(0))
    assert (of_qkv[:, :, 1:] == 0).all()


@pytest.mark.parametrize("along", [attention.along_space, attention.along_time])
def test_a_network_with_the_kernel_computes_the_same_on_other_devices(along):
    """There the formula takes its place, forward and backward."""
    causal = along is attention.along_time
    turned = angles(4, 32, causal=causal)
    qkv, grad = numbers((2, 4, 4, 32), "bfloat16")
    known = dict(num_heads=HEADS)
    fused, plain = (
        both(lambda qkv, how=how: along(qkv, turned, **known, implementation=how), qkv, grad)
        for how in ("fused", "xla")
    )
    assert (errors(fused, plain) < 1e-2).all()
