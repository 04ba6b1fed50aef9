"""Options of an environment, with checks; and the rewards of a step."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax import arguments
from cwm_jax.errors import UserError
from cwm_jax.sampling.worlds import Outcomes
from cwm_jax.world_model import WorldModel

RESET_OPTIONS = ("frames", "actions")
SCALE = 8  # of rendered frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an environment.

    Fields:
        checkpoint: any model that `WorldModel.from_pretrained` opens, or a `WorldModel`, of which
            the environment makes a fresh one with its own worlds; None: the project's own model.
        denoising_steps: of each frame; None: the model's own number.
        data: a data folder from whose validation episodes worlds start; None: that of the
            `WorldModel`, or the embedded one.
        prompt_frames: real frames that a world starts from; at most the network's window.
        rewards: whether the model's heads give rewards and end episodes; False: neither.
        reward_scale: the reward if the heads predict a positive one; negated for a negative one.
        threshold: smallest probability that counts as a prediction.
    """

    checkpoint: str | Path | WorldModel | None = None
    denoising_steps: int | None = None
    data: str | Path | None = None
    prompt_frames: int = 4
    rewards: bool = True
    reward_scale: float = 10.0
    threshold: float = 0.5

    def __post_init__(self):
        if not isinstance(self.rewards, bool):
            raise UserError(f"rewards={self.rewards!r}: must be True or False")
        if not isinstance(self.checkpoint, WorldModel):
            wanted = "a path, the name of a model on the hub, or a WorldModel"
            arguments.check_path("checkpoint", self.checkpoint, wanted)
        arguments.check_path("data", self.data, "the path of a data folder")
        for name, low, high in (("threshold", 0, 1), ("reward_scale", -1e9, 1e9)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and low <= value <= high):
                raise UserError(f"{name}={value!r}: must be a number {low:g}…{high:g}")

    def open(self) -> WorldModel:
        """The model with worlds of its own; it must have heads if rewards are enabled.

        Raises:
            UserError: it cannot be opened, or has no heads, or worlds cannot start.
        """
        make = functools.partial(WorldModel.from_pretrained, self.checkpoint)
        if isinstance(self.checkpoint, WorldModel):
            make = self.checkpoint.fresh
        model = make(denoising_steps=self.denoising_steps, starts=self.data)
        if self.rewards and not model.trained.network.heads:
            raise UserError(
                f"{model.trained.path} has no heads, which give rewards and end episodes: train "
                "with --config.model.heads=True, add them with `python -m cwm_jax.tools.heads`, or "
                "make the environment with rewards=False"
            )
        self._check_starts(model)
        return model

    def _check_starts(self, model: WorldModel) -> None:
        window = model.trained.network.max_frames
        arguments.integer(
            "prompt_frames", self.prompt_frames, 1, window, note="the network's window"
        )
        if self.data is not None:
            model.starts.at(0, self.prompt_frames)

    def earned(self, predicted: Outcomes) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, float64, and whether episodes end, bool; of the shape of the outcomes."""
        signs = (predicted.positive >= self.threshold) * 1.0 - (
            predicted.negative >= self.threshold
        )
        return signs * float(self.reward_scale), predicted.end >= self.threshold


def of(**given: Any) -> Options:
    """`Options` of these; raises a UserError for one that does not exist."""
    names = [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(set(given) - set(names)):
        raise UserError(
            f"there is no option {unknown[0]!r} of cwm/CoinRun-v0; valid are {', '.join(names)}"
        )
    return Options(**given)


def prompt(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of `WorldModel.reset` from options of `reset`.

    Raises:
        UserError: for an option that does not exist, or actions without frames.
    """
    options = of_reset(options)
    if unknown := sorted(set(options) - set(RESET_OPTIONS)):
        raise UserError(
            f"there is no option {unknown[0]!r} of reset; valid are {', '.join(RESET_OPTIONS)}: "
            "frames to start from, uint8 [P, 64, 64, 3], and the action that led into each, [P]"
        )
    if "actions" in options and "frames" not in options:
        raise UserError("reset needs the option frames with the option actions")
    return options


def of_reset(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of `reset` as a dict; raises a UserError for what is not one."""
    if not isinstance(options, Mapping | None):
        raise UserError(f"options={arguments.shown(options)}: must be a dict")
    return dict(options or {})


def check_render_mode(mode: str | None, modes: list[str]) -> None:
    """Raises a UserError for a render mode that does not exist."""
    if mode is not None and mode not in modes:
        raise UserError(f"render_mode={mode!r}: must be {', '.join(modes)}, or None")


def enlarged(frame_HWC: np.ndarray) -> np.ndarray:
    """A rendered frame, each pixel `SCALE` × `SCALE`."""
    return frame_HWC.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
