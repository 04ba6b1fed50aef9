"""What an environment can be made with, checked; and what a step earns."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.errors import UserError
from cwm_jax.sampling.worlds import Outcomes
from cwm_jax.world_model import WorldModel

RESET_OPTIONS = ("frames", "actions")
SCALE = 8  # of rendered frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an environment.

    Fields:
        checkpoint: whatever `WorldModel.from_pretrained` opens, or a `WorldModel` that is not used
            elsewhere; None: the model that comes with the project.
        denoising_steps: of each frame; None: the model's own number.
        data: a data folder from whose validation episodes worlds start; None: the embedded one.
        prompt_frames: real frames that a world starts from.
        rewards: whether the model's heads give rewards and end episodes; without, there are none.
        reward_scale: the reward where the heads say that it is positive; negated where negative.
        threshold: from which probability the heads count.
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
        if not (isinstance(self.prompt_frames, int) and self.prompt_frames >= 1):
            raise UserError(f"prompt_frames={self.prompt_frames!r}: must be a whole number ≥ 1")
        for name, low, high in (("threshold", 0, 1), ("reward_scale", -1e9, 1e9)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and low <= value <= high):
                raise UserError(f"{name}={value!r}: must be a number {low:g}…{high:g}")

    def open(self) -> WorldModel:
        """The model, which has heads if rewards are wanted.

        Raises:
            UserError: it cannot be opened, or has no heads.
        """
        model = self.checkpoint
        if not isinstance(model, WorldModel):
            model = WorldModel.from_pretrained(
                self.checkpoint, denoising_steps=self.denoising_steps, starts=self.data
            )
        if self.rewards and not model.trained.network.heads:
            raise UserError(
                f"{model.trained.path} has no heads, which give rewards and end episodes: train "
                "with --config.model.heads=True, add them with `python -m cwm_jax.tools.heads`, or "
                "make the environment with rewards=False"
            )
        return model

    def earned(self, predicted: Outcomes) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, float64, and whether episodes end, bool; shaped as the outcomes are."""
        signs = (predicted.positive >= self.threshold) * 1.0 - (
            predicted.negative >= self.threshold
        )
        return signs * float(self.reward_scale), predicted.end >= self.threshold


def of(**given: Any) -> Options:
    """`Options` of these; raises a UserError for one that does not exist."""
    names = [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(set(given) - set(names)):
        raise UserError(
            f"there is no option {unknown[0]!r} of cwm/CoinRun-v0; there are {', '.join(names)}"
        )
    return Options(**given)


def prompt(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of `WorldModel.reset` that options of `reset` give.

    Raises:
        UserError: for an option that does not exist, or actions without frames.
    """
    options = options or {}
    if unknown := sorted(set(options) - set(RESET_OPTIONS)):
        raise UserError(
            f"there is no option {unknown[0]!r} of reset; there are {', '.join(RESET_OPTIONS)}: "
            "frames to start from, uint8 [P, 64, 64, 3], and the action that led into each, [P]"
        )
    if "actions" in options and "frames" not in options:
        raise UserError("reset has the option actions without frames, into which they led")
    return dict(options)


def check_render_mode(mode: str | None, modes: list[str]) -> None:
    """Raises a UserError for a render mode that does not exist."""
    if mode is not None and mode not in modes:
        raise UserError(f"render_mode={mode!r}: there are {', '.join(modes)}, and None")


def enlarged(frame_HWC: np.ndarray) -> np.ndarray:
    """A frame for people, each pixel `SCALE` × `SCALE`."""
    return frame_HWC.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
