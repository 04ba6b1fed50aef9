"""The two layers that blocks are made of, with the backward passes that cost least.

Both compute what the textbook says; the autodiff of the plain formulas finds the same gradients
through more passes over memory.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cwm_jax.network import DiTConfig

_EPSILON = 1e-6


def linear(config: DiTConfig, inputs: int, outputs: int, *, rngs, **kwargs) -> nnx.Linear:
    """A linear layer in the compute dtype, its parameters in float32; Xavier uniform by default."""
    # float32 has to mean float32: without `precision` a GPU would multiply in TF32.
    precision = jax.lax.Precision.HIGHEST if config.compute_dtype == jnp.float32 else None
    kwargs = {"kernel_init": nnx.initializers.xavier_uniform()} | kwargs
    return nnx.Linear(
        inputs,
        outputs,
        dtype=config.compute_dtype,
        precision=precision,
        dot_general=_matrix_product,
        rngs=rngs,
        **kwargs,
    )


zeros_linear = functools.partial(linear, kernel_init=nnx.initializers.zeros)


def _matrix_product(x, kernel, dimension_numbers, **kwargs) -> jax.Array:
    """x [..., I] @ kernel [I, O], as the product of two matrices.

    Otherwise the kernel's gradient would be a sum over several axes, for which XLA on CPU first
    transposes all of the activations.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return product.reshape(*x.shape[:-1], -1)


def unit_rms(x: jax.Array) -> jax.Array:
    """x scaled to a root mean square of 1 over its last axis, in float32, in the dtype of x.

    RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) without a gain. Of queries
    and keys it bounds the attention's logits by √K (Dehghani et al. 2023,
    https://arxiv.org/abs/2302.05442).
    """
    exact = x.astype(jnp.float32)
    mean = jnp.square(exact).mean(-1, keepdims=True)
    return (exact * jax.lax.rsqrt(mean + _EPSILON)).astype(x.dtype)


@jax.custom_vjp
def modulated_norm(x_BTSD: jax.Array, shift_BTD: jax.Array, scale_BTD: jax.Array) -> jax.Array:
    """(1 + scale) · LayerNorm(x) + shift, as in adaLN (Peebles & Xie 2022), in the dtype of x.

    LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) over D, without parameters,
    ε = 1e-6, in float32. Shift and scale are those of a frame, the same for its S tokens.
    """
    return _forward(x_BTSD, shift_BTD, scale_BTD)[0]


def _forward(x_BTSD, shift_BTD, scale_BTD):
    x = x_BTSD.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)
    y = centred * inverse * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]
    return y.astype(x_BTSD.dtype), (x_BTSD, mean, inverse, shift_BTD, scale_BTD)


def _backward(kept, grad_BTSD):
    """With n = LayerNorm(x) and g the gradient at n: dx = (g − mean(g) − n · mean(g · n)) / σ."""
    x_BTSD, mean, inverse, shift_BTD, scale_BTD = kept
    grad = grad_BTSD.astype(jnp.float32)
    normed = (x_BTSD.astype(jnp.float32) - mean) * inverse
    of_normed = grad * (1 + scale_BTD[:, :, None])
    along = normed * (of_normed * normed).mean(-1, keepdims=True)
    of_x = inverse * (of_normed - of_normed.mean(-1, keepdims=True) - along)
    of_shift, of_scale = grad.sum(2), (grad * normed).sum(2)
    return (
        of_x.astype(x_BTSD.dtype),
        of_shift.astype(shift_BTD.dtype),
        of_scale.astype(scale_BTD.dtype),
    )


modulated_norm.defvjp(_forward, _backward)
