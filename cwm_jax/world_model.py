"""A trained world model as a Python object: load, reset, step, frames; many worlds at once.

    from cwm_jax import WorldModel

    world = WorldModel.from_pretrained("checkpoints/pocket")
    first = world.reset(batch=4, seed=0)  # uint8 [4, 64, 64, 3]: real frames of four episodes
    frame = world.step([7, 7, 1, 5])  # uint8 [4, 64, 64, 3]: generated; one action for each world
    video = world.rollout([[7] * 30] * 4)  # uint8 [4, 30, 64, 64, 3]: thirty frames in one call

Actions of CoinRun are listed in `cwm_jax.coinrun.ACTION_NAMES`.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cwm_jax import arguments, shipped
from cwm_jax.checkpoints import formats, hub_models, pretrained
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.data.starts import Starts
from cwm_jax.diffusion.schedule import NUM_LEVELS
from cwm_jax.errors import UserError
from cwm_jax.files import HUB
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels
from cwm_jax.sampling.worlds import Outcomes, WorldGenerator, Worlds


class WorldModel:
    """B worlds of one trained network.

    Args:
        trained: the network and its parameters.
        denoising_steps: for each frame, 1…1000; those of the model's config by default.
        starts: a data folder whose validation episodes `reset` starts from if no prompt is
            given; the embedded frames of CoinRun by default.

    Raises:
        UserError: an invalid argument.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        denoising_steps: int | None = None,
        starts: Path | str | None = None,
    ):
        if not isinstance(trained, Trained):
            raise UserError(
                f"trained={arguments.shown(trained)}: must be a `Trained`; "
                "WorldModel.from_pretrained(…) loads a model"
            )
        self.trained = trained
        self._set_steps(
            formats.usual_steps(trained) if denoising_steps is None else denoising_steps
        )
        self._set_starts(starts)
        self._worlds: Worlds | None = None
        self._outcomes: Outcomes | None = None

    @classmethod
    def from_pretrained(
        cls, source: Path | str | None = None, *, step: int | None = None, **options: Any
    ) -> "WorldModel":
        """Loads a model.

        Args:
            source: a run's workdir, one of its checkpoints, an export or a bundle; or a model on
                the hub, `USER/REPOSITORY[@REVISION]`, or with a folder
                `hf://USER/REPOSITORY[@REVISION]/FOLDER`;
                the project's own model by default.
            step: which checkpoint of a run; the newest by default.
            options: `denoising_steps` and `starts`, as above.

        Raises:
            UserError: there is no such model, here or on the hub, or it is damaged.
        """
        arguments.check_path("source", source, "a path, or the name of a model on the hub")
        path = pretrained.FOLDER if source is None else _located(source)
        return cls(formats.load(path, step=step), **options)

    def fresh(
        self, *, denoising_steps: int | None = None, starts: Path | str | None = None
    ) -> "WorldModel":
        """Another `WorldModel` of the same model, with worlds of its own: none before its `reset`.

        Both share the parameters and compiled programs, and neither changes the other's worlds.

        Args:
            denoising_steps, starts: as above; those of this one by default. Another number of
                steps takes a program of its own, and a copy of the parameters in the compute dtype.

        Raises:
            UserError: an invalid argument.
        """
        other = copy.copy(self)
        other._worlds = other._outcomes = None
        if denoising_steps not in (None, self.denoising_steps):
            other._set_steps(denoising_steps)
        if starts is not None:
            other._set_starts(starts)
        return other

    @property
    def batch(self) -> int:
        """The number of worlds, B; 0 before the first `reset`."""
        return 0 if self._worlds is None else len(self._worlds.count_B)

    @property
    def num_actions(self) -> int:
        """Actions are 0 … `num_actions` − 1."""
        return self.trained.network.action_values

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        size = self.trained.network.image_size
        return size, size, 3

    @property
    def starts(self) -> Starts:
        """Where worlds start if no prompt is given; opened when it is first needed.

        Raises:
            UserError: there is no such data.
        """
        if self._starts is None:
            folder = shipped.DATA if self._starts_folder is None else self._starts_folder
            self._starts = Starts(folder, num_actions=self.num_actions)
        return self._starts

    @property
    def frames(self) -> np.ndarray:
        """The newest frame of each world, uint8 [B, H, W, C]."""
        return np.asarray(jax.device_get(self._begun().frame_BHWC))

    def reset(
        self,
        frames: np.ndarray | None = None,
        actions: np.ndarray | None = None,
        *,
        batch: int | None = None,
        seed: int | Sequence[int] = 0,
        prompt_frames: int = 4,
        where: Sequence[bool] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Starts B worlds, and returns the newest frame of each, uint8 [B, H, W, C].

        Without `frames` each world starts from recorded frames that its seed chooses. The same
        prompt, seed and actions give the same frames.

        Args:
            frames: the prompt, uint8: one frame [H, W, C] or P frames [P, H, W, C] that all worlds
                share, or [B, P, H, W, C]; 1 ≤ P ≤ the network's window.
            actions: the action that led into each prompt frame, [P] or [B, P]; −1 for none, which
                only the first may have. Required if P > 1; not allowed without `frames`.
            batch: B; the present number, or 1, by default.
            seed: of world 0; world i gets seed + i. Or B seeds.
            prompt_frames: P, if no `frames` are given.
            where: bool [B]; worlds where it is False are unchanged. All start by default.

        Raises:
            UserError: an invalid argument.
        """
        if frames is not None:
            frames = arguments.prompt_frames(frames, self.frame_shape)
        elif actions is not None:
            raise UserError("actions without frames: expected the frames that they led into")
        batch = self._batch(frames, batch)
        where = self._where(where, batch)
        seeds = arguments.seeds(seed, batch)
        if frames is None:
            frames, actions = self._recorded(seeds, prompt_frames)
        else:
            frames, actions = arguments.prompt(frames, actions, batch)
        new = self.generator.begin(frames, actions, seeds)
        if where is not None and not where.all():
            new = self.generator.replaced(where, new, self._begun())
        self._worlds, self._outcomes = new, None
        return self.frames

    def step(self, actions: Sequence[int] | np.ndarray | int) -> np.ndarray:
        """Generates the next frame of each world, uint8 [B, H, W, C].

        Args:
            actions: one for each world, [B]; or a single one for all.

        Raises:
            UserError: an action is not an integer 0 … `num_actions` − 1, or they are not B.
        """
        batch = len(self._begun().count_B)
        given = self._actions(actions)
        if given.shape not in ((), (batch,)):
            raise UserError(
                f"actions of shape {given.shape} for {batch} worlds: must be one for each, "
                f"[{batch}], or a single one for all"
            )
        return self.rollout(np.broadcast_to(given, (batch,))[:, None])[:, 0]

    def rollout(self, actions_BF: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Generates one frame for each action, uint8 [B, F, H, W, C], in one call of the device.

        Raises:
            UserError: as `step`.
        """
        worlds, given = self._begun(), self._actions(actions_BF)
        self._worlds, frames, predicted = self.generator.rollout(worlds, given)
        self._outcomes = jax.device_get(predicted)
        return np.asarray(jax.device_get(frames))

    @property
    def outcomes(self) -> Outcomes:
        """Outcomes of the actions of the last `step` or `rollout`: probabilities, [B, F] each.

        Raises:
            UserError: the model has no heads, or no action has been taken.
        """
        if not self.trained.network.heads:
            raise UserError(
                f"{self.trained.path} has no heads, to predict rewards and ends of episodes: train "
                "with --config.model.heads=True, or add them with `python -m cwm_jax.tools.heads`"
            )
        if self._outcomes is None:
            raise UserError("no action has been taken: call step() first")
        return self._outcomes

    def _begun(self) -> Worlds:
        if self._worlds is None:
            raise UserError("no world was started: call reset() first")
        return self._worlds

    def _set_steps(self, steps: int) -> None:
        self.denoising_steps = arguments.integer("denoising_steps", steps, 1, NUM_LEVELS)
        self.generator = WorldGenerator(
            self.trained.network,
            self.trained.params,
            SamplerConfig(levels=ddim_levels(self.denoising_steps)),
        )

    def _set_starts(self, folder: Path | str | None) -> None:
        arguments.check_path("starts", folder, "the path of a data folder")
        self._starts_folder = folder
        self._starts: Starts | None = None

    def _actions(self, actions) -> np.ndarray:
        """Actions as an array of integers, of any shape and size."""
        return arguments.integers("actions", actions, f"integers 0…{self.num_actions - 1}")

    def _batch(self, frames: np.ndarray | None, batch: int | None) -> int:
        """The number of worlds that a reset is for."""
        given = len(frames) if frames is not None and frames.ndim == 5 else None
        if batch is None:
            batch = given if given is not None else self.batch or 1
        batch = arguments.integer("batch", batch, 1)
        if given not in (None, batch):
            raise UserError(f"batch={batch}, but frames are the prompts of {given} worlds")
        return batch

    def _where(self, where, batch: int) -> np.ndarray | None:
        """`where` as bools, one for each of the present worlds."""
        if where is None:
            return None
        found = arguments.booleans("where", where, "a bool for each world")
        if found.shape != (batch,) or batch != self.batch:
            raise UserError(
                f"where has the shape {found.shape} for a reset of {batch} worlds, but there "
                f"are {self.batch}: expected one bool for each of these"
            )
        return found

    def _recorded(self, seeds: list[int], frames: int) -> tuple[np.ndarray, np.ndarray]:
        window = self.trained.network.max_frames
        frames = arguments.integer("prompt_frames", frames, 1, window, "the network's window")
        found = [self.starts.at(seed, frames) for seed in seeds]
        return tuple(np.stack(part) for part in zip(*found, strict=True))


def _located(source: Path | str) -> Path:
    """The path of a model; a name of the hub's form that is no path here is of the hub."""
    if not isinstance(source, str) or shipped.found(source).exists():
        return pretrained.located(source)
    if hub_models.may_be_one(source):
        try:
            return pretrained.located(HUB + source)
        except UserError as error:
            raise UserError(f"there is no file or folder {source} here, and {error}") from None
    return pretrained.located(source)
