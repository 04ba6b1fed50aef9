"""Plain JAX versions of the kernels, for any device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def rotary_attention(
    qkv_RLMC: jax.Array, cos_LJ: np.ndarray, sin_LJ: np.ndarray, *, num_heads: int, causal: bool
) -> jax.Array:
    """See `cwm_jax.models.kernels.rotary_attention`; with gradients by autodiff."""
    return _out(*_split(qkv_RLMC, cos_LJ, sin_LJ, num_heads), causal)


def rotary_attention_with_little_kept(
    qkv_RLMC: jax.Array, cos_LJ: np.ndarray, sin_LJ: np.ndarray, *, num_heads: int, causal: bool
) -> jax.Array:
    """The same; its backward pass stores only qkv and writes its gradient at once."""

    @jax.custom_vjp
    def attend(qkv_RLMC):
        return rotary_attention(qkv_RLMC, cos_LJ, sin_LJ, num_heads=num_heads, causal=causal)

    backward = functools.partial(_backward, cos_LJ, sin_LJ, num_heads, causal)
    attend.defvjp(lambda qkv_RLMC: (attend(qkv_RLMC), qkv_RLMC), backward)
    return attend(qkv_RLMC)


def _split(qkv_RLMC, cos_LJ, sin_LJ, num_heads: int):
    """Rotated q and k, and v, each [R, L, M, N, K]."""
    q, k, v = jnp.moveaxis(qkv_RLMC.reshape(*qkv_RLMC.shape[:3], 3, num_heads, -1), 3, 0)
    return _rotate(q, cos_LJ, sin_LJ), _rotate(k, cos_LJ, sin_LJ), v


def _rotate(x_RLMNK, cos_LJ, sin_LJ):
    cos, sin = (table[:, None, None] for table in (cos_LJ, sin_LJ))
    first, second = jnp.split(x_RLMNK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RLMNK.dtype)


def _weights(q, k, causal: bool):
    """Softmax of the scores, float32 [R, M, N, L, L]."""
    scores = _product("rlmnk,rcmnk->rmnlc", q, k)
    if causal:
        scores = jnp.where(np.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def _out(q, k, v, causal: bool):
    out = _product("rmnlc,rcmnk->rlmnk", _weights(q, k, causal).astype(v.dtype), v)
    return out.reshape(*out.shape[:3], -1).astype(v.dtype)


def _backward(cos_LJ, sin_LJ, num_heads: int, causal: bool, qkv_RLMC, grad_RLMC):
    """With p = softmax(s) and g the gradient at p: ds = p · (g − Σ p · g), row by row."""
    q, k, v = _split(qkv_RLMC, cos_LJ, sin_LJ, num_heads)
    grad = grad_RLMC.reshape(v.shape)
    p = _weights(q, k, causal)
    of_v = _product("rmnlc,rlmnk->rcmnk", p.astype(v.dtype), grad)
    of_p = _product("rlmnk,rcmnk->rmnlc", grad, v)
    of_s = p * (of_p - (p * of_p).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    of_s = of_s.astype(v.dtype)
    of_q = _rotate(_product("rmnlc,rcmnk->rlmnk", of_s, k), cos_LJ, -sin_LJ)
    of_k = _rotate(_product("rmnlc,rlmnk->rcmnk", of_s, q), cos_LJ, -sin_LJ)
    parts = [part.astype(qkv_RLMC.dtype) for part in (of_q, of_k, of_v)]
    return (jnp.stack(parts, axis=3).reshape(qkv_RLMC.shape),)


def _product(subscripts: str, a, b):
    """A product with float32 results, never rounded to TF32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=exact, preferred_element_type=jnp.float32)
