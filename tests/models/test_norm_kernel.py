"""The kernels for GPUs, interpreted on the CPU, against the same formulas in plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import KEYS, plain_norm

from cwm_jax.diffusion import denoiser
from cwm_jax.errors import UserError
from cwm_jax.models import dit, layers
from cwm_jax.models.kernels import norm

ACCURACY = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for name in ("forward", "backward"):
        monkeypatch.setattr(norm, name, functools.partial(getattr(norm, name), interpret=True))


def arguments(frames, tokens=8, size=64, gated=True, kind="random"):
    keys = jax.random.split(KEYS[0], 6)
    stream, row = (*frames, tokens, size), (*frames, size)
    normal = lambda i, shape: jax.random.normal(keys[i], shape)
    x = normal(0, stream)
    if kind == "extreme":  # a far mean, and a frame without any variance
        x = (30 * x + 300).at[0, 0].set(7.0)
    update = layers.Update(normal(1, stream), normal(2, (size,)), normal(3, row)) if gated else None
    return x, update, normal(4, row), normal(5, row)


def formula(x, update, shift, scale):
    x = layers.add(x, update)
    return x, plain_norm(x, shift, scale)


def close(found, wanted, dtype):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == dtype
        least = ACCURACY[dtype] * float(jnp.sqrt(jnp.square(b).mean()))
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=ACCURACY[dtype], atol=4 * least)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pulled(function, args, grads):
    """A function's result and the gradients of its arguments, as one program."""
    found, pull = jax.vjp(function, *args)
    return found, pull(grads)


@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize(
    ("frames", "gated"), [((1, 1), True), ((3, 5), True), ((2, 8), True), ((3, 5), False)]
)
def test_update_and_norm_in_one_pass_are_those_of_the_formula(frames, gated, dtype):
    args = jax.tree.map(lambda x: x.astype(dtype), arguments(frames, gated=gated))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    grads = tuple(jax.random.normal(key, args[0].shape).astype(dtype) for key in KEYS[1:3])
    exact_grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    kernel = functools.partial(layers.add_and_norm, kernel="triton")
    found = value_and_pulled(kernel, args, grads)
    close(found, value_and_pulled(formula, exact, exact_grads), dtype)


def test_far_means_and_frames_without_variance_stay_finite_and_right():
    args = arguments((2, 2), kind="extreme")
    grads = jax.jit(layers.add_and_norm)(*args)
    found = value_and_pulled(functools.partial(layers.add_and_norm, kernel="triton"), args, grads)
    wanted = value_and_pulled(layers.add_and_norm, args, grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("tiling", [norm.Tiling(1, 1), norm.Tiling(2, 4), norm.Tiling(8, 8)])
def test_the_tiling_changes_nothing(tiling):
    x, update, shift, scale = arguments((4,))
    args = x, update, scale, x, x
    for a, b in zip(
        jax.tree.leaves(norm.forward(x, update, shift, scale, tiling=tiling)),
        jax.tree.leaves(norm.forward(x, update, shift, scale)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    found, wanted = norm.backward(*args, tiling=tiling), norm.backward(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_several_programs_for_a_frame_change_nothing(monkeypatch, gated):
    x, update, shift, scale = arguments((3,), tokens=16, gated=gated)
    found = []
    for least, parts in ((1, 1), (6, 2), (512, 4)):
        monkeypatch.setattr(norm, "_PROGRAMS", least)
        assert norm._parts(3, 16, norm._FORWARD) == parts
        found.append(norm.forward(x, update, shift, scale))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_few_frames_have_several_programs_each():
    parts = [norm._parts(frames, 64, norm._FORWARD) for frames in (1, 64, 300, 512, 4096)]
    assert parts == [16, 8, 2, 1, 1]
    assert norm._parts(1, 12, norm._FORWARD) == 1  # 6 tokens are not whole rows of a program


@pytest.mark.parametrize(("tokens", "size", "fits"), [(64, 512, 1), (16, 640, 0), (9, 64, 0)])
def test_xla_computes_shapes_that_do_not_fit(tokens, size, fits):
    x, update, shift, scale = arguments((1, 1), tokens, size)
    assert norm.fits(x) == bool(fits)
    program = jax.make_jaxpr(functools.partial(layers.add_and_norm, kernel="triton"))
    assert ("pallas_call" in str(program(x, update, shift, scale))) == bool(fits)


def test_a_network_with_the_kernels_computes_the_same(tiny):
    network = dataclasses.replace(tiny, hidden_size=64, num_heads=2, depth=1)
    rng = np.random.default_rng(2)
    params = {
        name: 0.2 * rng.standard_normal(x.shape, np.float32)
        for name, x in sorted(dit.shapes(network).items())
    }
    sample = jax.random.normal(KEYS[0], (2, 3, 64, 64, 3))
    t, action = jnp.array([[0, 5, 999]] * 2), jnp.array([[-1, 3, 7]] * 2)

    def loss(params, norm):
        net = denoiser.bind(dataclasses.replace(network, norm=norm), params)
        return jnp.square(net(sample, t, action)).mean()

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    one, other = (both(params, name) for name in ("triton", "xla"))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_an_unknown_norm_is_refused(tiny):
    with pytest.raises(UserError, match=r"config\.model\.norm must be one of auto, xla, triton"):
        dataclasses.replace(tiny, norm="cudnn")
