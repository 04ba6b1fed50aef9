"""Heads on the network: what the action pressed at a frame earns, and whether it ends the episode.

As in DIAMOND (Alonso et al. 2024, https://arxiv.org/abs/2405.12399) the reward is one of three
classes, its sign. The heads see a frame and the ones before it, as the blocks leave them, and the
action pressed at it: the frame that this action leads to is never recorded where an episode ends.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.layers import gelu, linear, zeros_linear

PREFIX = "heads."  # of the names of their parameters
SIGNS = 3  # of a reward: negative, none, positive
_TOKEN = 16  # numbers kept of each token
_HIDDEN = 256
_EPSILON = 1e-6


class Outcomes(NamedTuple):
    """What the heads say of frames and the actions pressed at them, float32 logits."""

    reward: jax.Array  # [..., 3]: negative, none, positive
    end: jax.Array  # [...]


class Heads(nnx.Module):
    """From the tokens of a frame and the action pressed at it to `Outcomes`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.token_in = linear(config, config.hidden_size, _TOKEN, rngs=rngs)
        self.scene_in = linear(config, config.tokens * _TOKEN, _HIDDEN, rngs=rngs)
        self.action_in = linear(config, config.num_actions, _HIDDEN, use_bias=False, rngs=rngs)
        self.hidden = linear(config, _HIDDEN, _HIDDEN, rngs=rngs)
        self.reward_out = zeros_linear(config, _HIDDEN, SIGNS, rngs=rngs)
        self.end_out = zeros_linear(config, _HIDDEN, 1, rngs=rngs)

    def scene(self, tokens_BTSD: jax.Array) -> jax.Array:
        """What is kept of frames until an action is known, [B, T, 256]."""
        exact = tokens_BTSD.astype(jnp.float32)
        centred = exact - exact.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)
        kept = gelu(self.token_in(centred / deviation))
        return self.scene_in(kept.reshape(*kept.shape[:-2], -1))

    def __call__(self, scene_BTH: jax.Array, pressed_BTA: jax.Array) -> Outcomes:
        """The outcomes of actions, given as `dit.action_vectors`."""
        hidden = gelu(self.hidden(gelu(scene_BTH + self.action_in(pressed_BTA))))
        exact = lambda layer: layer(hidden).astype(jnp.float32)
        return Outcomes(exact(self.reward_out), exact(self.end_out)[..., 0])
