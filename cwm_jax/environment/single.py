"""One world as a `gymnasium.Env`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from cwm_jax import arguments
from cwm_jax.coinrun import FPS
from cwm_jax.environment import options as option_checks
from cwm_jax.environment.display import Display
from cwm_jax.errors import UserError

try:
    import gymnasium
    from gymnasium import spaces
except ImportError:
    raise UserError("the environment needs Gymnasium: pip install 'cwm_jax[env]'") from None


class CoinRunEnv(gymnasium.Env):
    """CoinRun as a model generates it.

    Observations are frames, uint8 [64, 64, 3]; actions are Procgen's 15. Rewards and ends of
    episodes are predicted by the model's heads from the action and earlier frames; `info` has
    their probabilities. Gymnasium limits episodes (`max_episode_steps` of `make`).

    `reset(options={"frames": …, "actions": …})` starts from these frames instead of recorded ones.

    Args:
        render_mode: "rgb_array", enlarged frames, uint8 [512, 512, 3]; "human", a window.
        settings: see `cwm_jax.environment.options.Options`.

    Raises:
        UserError: an invalid option, or a model without heads if rewards are enabled.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array", "human"], "render_fps": FPS}

    def __init__(self, render_mode: str | None = None, **settings: Any):
        self.options = option_checks.of(**settings)
        option_checks.check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.world = self.options.open()
        self.observation_space = spaces.Box(0, 255, self.world.frame_shape, np.uint8)
        self.action_space = spaces.Discrete(self.world.num_actions)
        self._display: Display | None = None
        self._frame: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        given = option_checks.prompt(options)
        (self._frame,) = self.world.reset(
            **given,
            batch=1,
            seed=int(self.np_random.integers(arguments.NUM_SEEDS)),
            prompt_frames=self.options.prompt_frames,
        )
        self._show()
        return self._frame.copy(), {}

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._frame is None:
            raise UserError("step() before reset(): no world was started")
        chosen = arguments.integers("action", action, f"one of {self.action_space}")
        if chosen.size != 1:
            raise UserError(f"action={arguments.shown(action)}: must be one of {self.action_space}")
        (self._frame,) = self.world.step(chosen.reshape(1))
        reward, ended, info = 0.0, False, {}
        if self.options.rewards:
            predicted = self.world.outcomes
            rewards, ends = self.options.earned(predicted)
            reward, ended = float(rewards[0, 0]), bool(ends[0, 0])
            info = {
                "reward_probability": float(predicted.positive[0, 0]),
                "end_probability": float(predicted.end[0, 0]),
            }
        self._show()
        return self._frame.copy(), reward, ended, False, info

    def render(self) -> np.ndarray | None:
        if self.render_mode == "rgb_array" and self._frame is not None:
            return option_checks.enlarged(self._frame)
        return None

    def _show(self) -> None:
        if self.render_mode == "human":
            self._display = self._display or Display("cwm/CoinRun-v0", FPS)
            self._display.show(option_checks.enlarged(self._frame))

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
