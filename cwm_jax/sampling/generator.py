"""What generates frames: the sampler of a network, an exported bundle, or anything like them."""

from typing import Any, Protocol

import jax


class Generator(Protocol):
    """Generates the next frames of B worlds from their states and the actions.

    `sampler.Sampler` and `cwm_jax.checkpoints.bundle.Bundle` are such. Rollouts, videos and
    evaluation need no more of a model. The page needs other calls, since its players have worlds
    of different ages in one batch: `cwm_jax.play.inference.scheduler.FrameGenerator`.
    """

    network: Any  # `image_size`, `max_frames`, `num_actions`, `action_values`
    config: Any  # `levels`, `window`, `eta`, `context_level`, as of `sampler.SamplerConfig`

    def start(self, frames_BPHWC, actions_BP) -> Any:
        """The state of B worlds that begin with these P prompt frames, 1 ≤ P ≤ `max_frames`.

        Args:
            frames_BPHWC: uint8.
            actions_BP: the action that led into each frame; the first may be −1 (none).

        Raises:
            UserError: for a prompt that does not fit the network, naming the value.
        """

    def step(self, state: Any, action_B, key: jax.Array) -> tuple[Any, jax.Array]:
        """Generates one frame: (the state after it, uint8 [B, H, W, C]). `state` is used up."""

    def rollout(self, state: Any, actions_BF, key: jax.Array) -> tuple[Any, jax.Array]:
        """Generates a frame for each action: (the state after, uint8 frames [B, F, H, W, C]).

        `state` is used up.

        Raises:
            UserError: for an action outside 0…A − 1, or a wrong number of worlds.
        """
