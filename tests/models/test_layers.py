"""The layers and their own backward passes, compared with the plain formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwm_jax.models import layers

KEYS = jax.random.split(jax.random.key(5), 4)


def plain_norm(x, shift, scale):
    """The plain formula of adaLN, with gradients by autodiff."""
    x = x.astype(jnp.float32)
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * (1 + scale[:, :, None]) + shift[:, :, None]


def arguments(dtype="float32"):
    x = 3 + 2 * jax.random.normal(KEYS[0], (2, 3, 5, 7))
    shift, scale = (jax.random.normal(key, (2, 3, 7)) for key in KEYS[1:3])
    return [a.astype(dtype) for a in (x, shift, scale)]


def test_the_modulated_norm_and_its_gradients_are_those_of_the_formula():
    weights = jax.random.normal(KEYS[3], (2, 3, 5, 7))
    pulled = lambda norm: lambda *args: (norm(*args) * weights).sum()
    args = arguments()
    np.testing.assert_allclose(layers.modulated_norm(*args), plain_norm(*args), atol=1e-5)
    found = jax.jit(jax.grad(pulled(layers.modulated_norm), argnums=(0, 1, 2)))(*args)
    wanted = jax.jit(jax.grad(pulled(plain_norm), argnums=(0, 1, 2)))(*args)
    for name, a, b in zip(("x", "shift", "scale"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_the_norm_is_computed_in_float32_and_returned_in_the_dtype_of_its_input():
    args = arguments("bfloat16")
    found = layers.modulated_norm(*args)
    assert found.dtype == jnp.bfloat16
    wanted = plain_norm(*(a.astype(jnp.float32) for a in args))
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-2)
    grads = jax.grad(lambda *a: layers.modulated_norm(*a).sum(), argnums=(0, 1, 2))(*args)
    assert {grad.dtype for grad in grads} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 5, 6)])
def test_a_linear_layer_takes_any_leading_axes(tiny, shape):
    layer = layers.linear(tiny, 6, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEYS[0], shape)
    found = layer(x)
    assert found.shape == (*shape[:-1], 4)
    np.testing.assert_allclose(found, np.asarray(x) @ layer.kernel[...], atol=1e-6)


def test_the_gradient_of_a_kernel_sums_over_one_axis(tiny):
    """Over several, XLA on CPU transposes all activations first: a tenth of a training step."""
    layer = layers.linear(tiny, 6, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    loss = lambda state, x: jnp.square(nnx.merge(graph, state)(x)).sum()
    program = jax.make_jaxpr(jax.grad(loss))(state, jnp.zeros((2, 3, 5, 6)))
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    summed = [e.params["dimension_numbers"][0][0] for e in products]
    assert len(summed) == 2  # forward, and for the kernel
    assert all(len(axes) == 1 for axes in summed)


def test_float32_means_float32(tiny):
    precise = lambda dtype: (
        layers.linear(dataclasses.replace(tiny, dtype=dtype), 6, 4, rngs=nnx.Rngs(0)).precision
    )
    assert precise("float32") == jax.lax.Precision.HIGHEST
    assert precise("bfloat16") is None


@pytest.mark.parametrize(("dtype", "accuracy"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gelu_and_its_gradient_are_those_of_the_formula(dtype, accuracy):
    x = jnp.concatenate([jnp.linspace(-12, 12, 97), jnp.array([-1e4, -40, 0, 40, 1e4])])
    exact = functools.partial(jax.nn.gelu, approximate=True)
    x, grad = x.astype(dtype), jnp.cos(jnp.arange(len(x))).astype(dtype)
    wanted, pull = jax.vjp(exact, x.astype(jnp.float32))
    found, found_pull = jax.vjp(layers.gelu, x)
    for a, b in ((found, wanted), (found_pull(grad)[0], pull(grad.astype(jnp.float32))[0])):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=accuracy, atol=accuracy)


def test_gelu_stores_only_its_input():
    x = jnp.ones((4, 8), jnp.bfloat16)
    _, pull = jax.vjp(layers.gelu, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


def test_an_update_is_added_through_its_gate():
    x, shift, scale = arguments()
    product, bias = jnp.flip(x), jnp.arange(7.0)
    update = layers.Update(product, bias, shift)
    wanted = x + shift[:, :, None] * (product + bias)
    added, normed = layers.add_and_norm(x, update, shift, scale)
    np.testing.assert_allclose(added, wanted, rtol=1e-6)
    np.testing.assert_allclose(normed, plain_norm(wanted, shift, scale), atol=1e-5)
    assert layers.add(x, None) is x


def test_a_product_is_the_layer_without_its_bias(tiny):
    layer = layers.linear(tiny, 6, 4, rngs=nnx.Rngs(0), bias_init=nnx.initializers.ones)
    x = jax.random.normal(KEYS[0], (2, 3, 6))
    np.testing.assert_allclose(layers.product(layer, x) + 1, layer(x), atol=1e-6)
