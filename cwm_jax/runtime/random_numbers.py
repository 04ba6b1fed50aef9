"""Random numbers that depend only on key and shape, not on JAX's settings.

`JAX_ENABLE_X64` and `JAX_DEFAULT_PRNG_IMPL` change the results of `jax.random` unless type and
generator are given, as they are here.
"""

import jax
import jax.numpy as jnp


def key(seed) -> jax.Array:
    """A key of the generator that all noise of this project uses."""
    return jax.random.key(seed, impl="threefry2x32")


def wrap_key(data: jax.Array) -> jax.Array:
    """The inverse of `jax.random.key_data`."""
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 1), float32."""
    return jax.random.normal(key, shape, jnp.float32)


def integers(key: jax.Array, shape: tuple[int, ...], low, high) -> jax.Array:
    """Uniform in low … high − 1, int32."""
    return jax.random.randint(key, shape, low, high, jnp.int32)


def happens(key: jax.Array, shape: tuple[int, ...], share: float) -> jax.Array:
    """True with this probability, bool."""
    return jax.random.bernoulli(key, jnp.float32(share), shape)
