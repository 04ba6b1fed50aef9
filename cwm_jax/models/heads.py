"""Heads on the network: what the action pressed at a frame earns, and whether it ends the episode.

As in DIAMOND (Alonso et al. 2024, https://arxiv.org/abs/2405.12399) the reward is one of three
classes, its sign. The heads see a frame and the ones before it, as the blocks leave them, and the
action pressed at it: the frame that this action leads to is never recorded where an episode ends.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.layers import gelu, linear, zeros_linear
from cwm_jax.runtime import random_numbers

PREFIX = "heads."  # of the names of their parameters
SIGNS = 3  # of a reward: negative, none, positive
_TOKEN = 16  # numbers kept of each token
WIDTH = 256  # of what is kept of a frame
_EPSILON = 1e-6


class Outcomes(NamedTuple):
    """What the heads say of frames and the actions pressed at them, float32 logits."""

    reward: jax.Array  # [..., 3]: negative, none, positive
    end: jax.Array  # [...]


class Heads(nnx.Module):
    """From the tokens of a frame and the action pressed at it to `Outcomes`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.token_in = linear(config, config.hidden_size, _TOKEN, rngs=rngs)
        self.scene_in = linear(config, config.tokens * _TOKEN, WIDTH, rngs=rngs)
        self.action_in = linear(config, config.num_actions, WIDTH, use_bias=False, rngs=rngs)
        self.hidden = linear(config, WIDTH, WIDTH, rngs=rngs)
        self.reward_out = zeros_linear(config, WIDTH, SIGNS, rngs=rngs)
        self.end_out = zeros_linear(config, WIDTH, 1, rngs=rngs)

    def scene(self, tokens_BTSD: jax.Array) -> jax.Array:
        """What is kept of frames until an action is known, float32 [B, T, 256]."""
        return self.scene_of_normed(normed(tokens_BTSD))

    def scene_of_normed(self, tokens_BTSD: jax.Array) -> jax.Array:
        """As `scene`, of tokens that `normed` has scaled."""
        kept = gelu(self.token_in(tokens_BTSD))
        return self.scene_in(kept.reshape(*kept.shape[:-2], -1)).astype(jnp.float32)

    def __call__(self, scene_BTH: jax.Array, pressed_BTA: jax.Array) -> Outcomes:
        """The outcomes of actions, given as `dit.action_vectors`."""
        hidden = gelu(self.hidden(gelu(scene_BTH + self.action_in(pressed_BTA))))
        exact = lambda layer: layer(hidden).astype(jnp.float32)
        return Outcomes(exact(self.reward_out), exact(self.end_out)[..., 0])


def normed(tokens_BTSD: jax.Array) -> jax.Array:
    """Tokens less their mean and over their standard deviation, float32."""
    exact = tokens_BTSD.astype(jnp.float32)
    centred = exact - exact.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)


def bind(config: DiTConfig, params: dict[str, jax.Array]) -> Heads:
    """Heads with these parameters, under the names that they have in the network."""
    graph, state = _skeleton(config)
    flat = [
        (path, leaf.replace(params[PREFIX + ".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.lru_cache
def _skeleton(config: DiTConfig):
    make = lambda: Heads(config, rngs=nnx.Rngs(random_numbers.key(0)))
    return nnx.split(nnx.eval_shape(make), nnx.Param)
