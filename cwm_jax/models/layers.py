"""The layers of blocks, with efficient backward passes.

All compute the textbook formulas; autodiff of these gives the same gradients with more memory
traffic.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.kernels import gelu_product as gelu_kernel
from cwm_jax.models.kernels import norm


def linear(config: DiTConfig, inputs: int, outputs: int, *, rngs, **kwargs) -> nnx.Linear:
    """A linear layer in the compute dtype, its parameters in float32; Xavier uniform by default."""
    # Without `precision` a GPU would multiply float32 in TF32.
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
    """`lax.dot_general` of the layers: x [..., I] @ kernel [I, O]."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return _times(x, kernel, **kwargs)


def _times(x, kernel, **kwargs) -> jax.Array:
    """x [..., I] @ kernel [I, O], as the product of two matrices.

    Otherwise the kernel's gradient would be a sum over several axes, for which XLA on CPU first
    transposes all of the activations.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return product.reshape(*x.shape[:-1], -1)


def unit_rms(qkv_BTSC: jax.Array, num_heads: int) -> jax.Array:
    """Queries, keys and values [B, T, S, 3 · N · K], queries and keys scaled to RMS 1 by head.

    RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) without a gain, in float32.
    It bounds the attention's logits by √K (Dehghani et al. 2023,
    https://arxiv.org/abs/2302.05442).
    """
    exact = qkv_BTSC.reshape(*qkv_BTSC.shape[:-1], 3, num_heads, -1).astype(jnp.float32)
    mean = jnp.square(exact).mean(-1, keepdims=True)
    is_value = (np.arange(3) == 2)[:, None, None]
    scaled = exact * jnp.where(is_value, 1, jax.lax.rsqrt(mean + norm.EPSILON))
    return scaled.astype(qkv_BTSC.dtype).reshape(qkv_BTSC.shape)


def product(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """The output of `layer` for x [..., I] without its bias."""
    kernel = layer.kernel[...].astype(layer.dtype)
    return _times(x.astype(layer.dtype), kernel, precision=layer.precision)


class Update(NamedTuple):
    """An update of the residual stream by a half block: gate · (product + bias)."""

    product_BTSD: jax.Array
    bias_D: jax.Array
    gate_BTD: jax.Array


def add(x_BTSD: jax.Array, update: Update | None) -> jax.Array:
    """The residual stream with an update."""
    if update is None:
        return x_BTSD
    product_BTSD, bias_D, gate_BTD = update
    return x_BTSD + gate_BTD[:, :, None] * (product_BTSD + bias_D.astype(x_BTSD.dtype))


def add_and_norm(
    x_BTSD: jax.Array,
    update: Update | None,
    shift_BTD: jax.Array,
    scale_BTD: jax.Array,
    *,
    kernel: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with an update, and its modulated norm.

    `kernel` is "xla" or "triton", a fused kernel for NVIDIA GPUs; XLA computes shapes that it does
    not support.
    """
    if kernel == "triton" and norm.fits(x_BTSD):
        return _one_pass(x_BTSD, update, shift_BTD, scale_BTD)
    x_BTSD = add(x_BTSD, update)
    return x_BTSD, modulated_norm(x_BTSD, shift_BTD, scale_BTD)


@jax.custom_vjp
def _one_pass(x_BTSD, update, shift_BTD, scale_BTD):
    return _one_pass_forward(x_BTSD, update, shift_BTD, scale_BTD)[0]


def _one_pass_forward(x_BTSD, update, shift_BTD, scale_BTD):
    flat = jax.tree.map(_by_frame, (x_BTSD, update, shift_BTD, scale_BTD))
    found = norm.forward(*flat)
    back = lambda x: x.reshape(x_BTSD.shape)
    results = (x_BTSD, back(found)) if update is None else tuple(map(back, found))
    return results, (results[0], update, shift_BTD, scale_BTD)


def _one_pass_backward(kept, grads):
    added_BTSD, update, shift_BTD, scale_BTD = kept
    flat = jax.tree.map(_by_frame, (added_BTSD, update, scale_BTD, grads[1], grads[0]))
    of_x, of_product, sums = norm.backward(*flat)
    back = lambda x, like: x.reshape(like.shape).astype(like.dtype)
    of_update = None
    if update is not None:
        # The gradient of the bias is that of the products, which is already summed over tokens.
        of_bias = (flat[1].gate_BTD.astype(jnp.float32) * sums[3]).sum(0)
        of_update = Update(
            back(of_product, added_BTSD),
            of_bias.astype(update.bias_D.dtype),
            back(sums[2], update.gate_BTD),
        )
    of_shift, of_scale = back(sums[0], shift_BTD), back(sums[1], scale_BTD)
    return back(of_x, added_BTSD), of_update, of_shift, of_scale


_one_pass.defvjp(_one_pass_forward, _one_pass_backward)


def _by_frame(x: jax.Array) -> jax.Array:
    """[B, T, ...] → [B · T, ...]; a bias [D] stays."""
    return x if x.ndim == 1 else x.reshape(-1, *x.shape[2:])


@jax.custom_vjp
def modulated_norm(x_BTSD: jax.Array, shift_BTD: jax.Array, scale_BTD: jax.Array) -> jax.Array:
    """(1 + scale) · LayerNorm(x) + shift, as in adaLN (Peebles & Xie 2022), in the dtype of x.

    LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) over D, without parameters,
    ε = 1e-6, in float32. Shift and scale are those of a frame, the same for its S tokens.
    """
    x = x_BTSD.astype(jnp.float32)
    mean, inverse = _statistics(x)
    y = (x - mean) * inverse * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]
    return y.astype(x_BTSD.dtype)


def _statistics(x):
    """Mean and 1 / standard deviation of each token, float32 [..., 1]."""
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + norm.EPSILON)


def _norm_backward(kept, grad_BTSD):
    """With n = LayerNorm(x) and g the gradient at n: dx = (g − mean(g) − n · mean(g · n)) / σ."""
    x_BTSD, shift_BTD, scale_BTD = kept
    x, grad = x_BTSD.astype(jnp.float32), grad_BTSD.astype(jnp.float32)
    # A separate kernel: otherwise XLA on GPU writes the normed x in float32 for `of_scale`.
    mean, inverse = jax.lax.optimization_barrier(_statistics(x))
    normed = (x - mean) * inverse
    of_normed = grad * (1 + scale_BTD[:, :, None])
    along = normed * (of_normed * normed).mean(-1, keepdims=True)
    of_x = inverse * (of_normed - of_normed.mean(-1, keepdims=True) - along)
    of_shift, of_scale = grad.sum(2), (grad * normed).sum(2)
    return (
        of_x.astype(x_BTSD.dtype),
        of_shift.astype(shift_BTD.dtype),
        of_scale.astype(scale_BTD.dtype),
    )


modulated_norm.defvjp(lambda *args: (modulated_norm(*args), args), _norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU by tanh (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415) in the dtype of x.

    Its backward pass needs only x from the forward pass.
    """
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x, grad):
    slope = gelu_kernel.slope(x.astype(jnp.float32))
    return ((grad.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def gelu_product(
    x: jax.Array,
    bias_H: jax.Array,
    matrix_HO: jax.Array,
    *,
    precision=None,
    kernel: str = "xla",
    recompute: bool = False,
) -> jax.Array:
    """gelu(x + bias) · matrix for x [..., H], all in one dtype.

    Args:
        precision: of the product.
        kernel: "xla", or "triton": one kernel for NVIDIA GPUs computes the gradients of x and bias,
            where it supports the shapes.
        recompute: whether the backward pass computes the GELU again, and does not store it.
    """
    if kernel == "triton" and gelu_kernel.fits(x, matrix_HO):
        return _gelu_product(x, bias_H, matrix_HO, precision, recompute)
    hidden = (jax.checkpoint(gelu) if recompute else gelu)(x + bias_H)
    return _times(hidden, matrix_HO, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gelu_product(x, bias_H, matrix_HO, precision, recompute: bool):
    return _gelu_product_forward(x, bias_H, matrix_HO, precision, recompute)[0]


def _gelu_product_forward(x, bias_H, matrix_HO, precision, recompute: bool):
    x = x + bias_H
    hidden = gelu(x)
    found = _times(hidden, matrix_HO, precision=precision)
    return found, (x, matrix_HO, None if recompute else hidden)


def _gelu_product_backward(precision, recompute: bool, kept, grad):
    x, matrix_HO, hidden = kept
    rows = lambda y: y.reshape(-1, y.shape[-1])
    of_x, of_bias = gelu_kernel.gradient(rows(grad), matrix_HO, rows(x))
    if recompute:
        # Without the barrier XLA would store the result of the forward pass for this one.
        hidden = gelu(jax.lax.optimization_barrier(x))
    of_matrix = jnp.matmul(rows(hidden).T, rows(grad), precision=precision)
    return of_x.reshape(x.shape), of_bias.astype(x.dtype), of_matrix


_gelu_product.defvjp(_gelu_product_forward, _gelu_product_backward)
