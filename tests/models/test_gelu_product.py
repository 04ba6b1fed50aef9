"""The kernel of the gradient of GELU and product, interpreted, against the formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.diffusion import denoiser
from cwm_jax.models import dit, layers
from cwm_jax.models.kernels import gelu_product

ACCURACY = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Runs the kernel in the interpreter; the list of its calls."""
    calls, run = [], functools.partial(gelu_product.gradient, interpret=True)
    counted = lambda *args, **how: calls.append(args) or run(*args, **how)
    monkeypatch.setattr(gelu_product, "gradient", counted)
    return calls


def formula(x, bias, matrix):
    hidden = jax.nn.gelu(x + bias, approximate=True)
    return jnp.matmul(hidden, matrix, precision=jax.lax.Precision.HIGHEST)


def arguments(rows, scale=1.0, size=256, outputs=64):
    keys = jax.random.split(jax.random.key(0), 4)
    x = scale * jax.random.normal(keys[0], (*rows, size))
    bias = jax.random.normal(keys[3], (size,))
    matrix = jax.random.normal(keys[1], (size, outputs)) / size**0.5
    return x, bias, matrix, jax.random.normal(keys[2], (*rows, outputs))


def near(found, wanted, dtype):
    assert found.dtype == dtype
    least = 4 * ACCURACY[dtype] * float(jnp.sqrt(jnp.square(wanted).mean()))
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=ACCURACY[dtype], atol=least)


@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize(
    ("rows", "scale", "recompute"), [((2, 64), 1, False), ((1, 6, 64), 40, True)]
)
def test_values_and_gradients_are_those_of_the_formula(rows, scale, dtype, recompute):
    *args, grad = (x.astype(dtype) for x in arguments(rows, scale))
    exact = [x.astype(jnp.float32) for x in args]
    how = dict(kernel="triton", recompute=recompute)
    found, pull = jax.vjp(functools.partial(layers.gelu_product, **how), *args)
    wanted, wanted_pull = jax.vjp(formula, *exact)
    near(found, wanted, dtype)
    for a, b in zip(pull(grad), wanted_pull(grad.astype(jnp.float32)), strict=True):
        near(a, b, dtype)


@pytest.mark.parametrize(
    "tiling", [gelu_product.Tiling(64, 64, 32), gelu_product.Tiling(32, 256, 64)]
)
def test_the_tiling_changes_nothing(tiling):
    x, _, matrix, grad = arguments((128,))
    found = gelu_product.gradient(grad, matrix, x, tiling=tiling)
    for a, b in zip(found, gelu_product.gradient(grad, matrix, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_shapes_that_are_no_whole_tiles_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(gelu_product, "gradient", None)
    *args, grad = arguments((3, 40))
    _, pull = jax.vjp(functools.partial(layers.gelu_product, kernel="triton"), *args)
    assert jnp.isfinite(pull(grad)[0]).all()


@pytest.mark.parametrize("remat", ["none", "gelu_norm"])
def test_a_network_with_the_kernel_has_the_same_gradients(tiny, remat, interpreted):
    network = dataclasses.replace(tiny, hidden_size=64, num_heads=2, depth=1, patch_size=8)
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape),
        dit.init(network, 0),
    )
    sample = jax.random.normal(jax.random.key(1), (2, 2, 64, 64, 3))
    t, action = jnp.full((2, 2), 500), jnp.ones((2, 2), jnp.int32)

    def loss(params, mlp):
        net = denoiser.bind(dataclasses.replace(network, mlp=mlp), params).net
        return jnp.square(net(sample, t, action, remat=remat).residual).mean()

    found, wanted = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, m) for m in ("triton", "xla")
    )
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-3, atol=1e-6, err_msg=name)
    assert len(interpreted) == 2 * network.depth
