"""A trained world model as a Python object: load, reset, step, frames; many worlds at once.

    from cwm_jax import WorldModel

    world = WorldModel.from_pretrained("checkpoints/pocket")
    first = world.reset(batch=4, seed=0)  # uint8 [4, 64, 64, 3]: real frames of four episodes
    frame = world.step([7, 7, 1, 5])  # uint8 [4, 64, 64, 3]: generated; one action for each world
    video = world.rollout([[7] * 30] * 4)  # uint8 [4, 30, 64, 64, 3]: thirty frames in one call

Actions of CoinRun are listed in `cwm_jax.coinrun.ACTION_NAMES`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cwm_jax import shipped
from cwm_jax.checkpoints import formats, hub_models, pretrained
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.coinrun import NO_ACTION
from cwm_jax.data.starts import Starts
from cwm_jax.errors import UserError
from cwm_jax.files import HUB
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels
from cwm_jax.sampling.worlds import Outcomes, WorldGenerator, Worlds

_SEEDS = 2**32


class WorldModel:
    """B worlds of one trained network.

    Args:
        trained: the network and its parameters.
        denoising_steps: for each frame, 1…1000; those of the model's config by default.
        starts: a data folder whose validation episodes `reset` starts from if no prompt is
            given; the embedded frames of CoinRun by default.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        denoising_steps: int | None = None,
        starts: Path | str | None = None,
    ):
        steps = formats.usual_steps(trained) if denoising_steps is None else denoising_steps
        self.trained = trained
        self.denoising_steps = steps
        self.generator = WorldGenerator(
            trained.network, trained.params, SamplerConfig(levels=ddim_levels(steps))
        )
        self._starts_folder = starts
        self._starts: Starts | None = None
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
        path = pretrained.FOLDER if source is None else _located(source)
        return cls(formats.load(path, step=step), **options)

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
                only the first may have. Required if P > 1.
            batch: B; the present number, or 1, by default.
            seed: of world 0; world i gets seed + i. Or B seeds.
            prompt_frames: P, if no `frames` are given.
            where: bool [B]; worlds where it is False are unchanged. All start by default.

        Raises:
            UserError: an invalid argument.
        """
        batch = self._batch(frames, batch, where)
        seeds = _seeds(seed, batch)
        if frames is None:
            frames, actions = self._recorded(seeds, prompt_frames)
        else:
            frames, actions = _for_all(np.asarray(frames), actions, batch)
        new = self.generator.begin(frames, actions, seeds)
        if where is not None and not np.all(where):
            new = self.generator.replaced(where, new, self._begun())
        self._worlds, self._outcomes = new, None
        return self.frames

    def step(self, actions: Sequence[int] | np.ndarray | int) -> np.ndarray:
        """Generates the next frame of each world, uint8 [B, H, W, C].

        Args:
            actions: one for each world, [B]; or a single one for all.

        Raises:
            UserError: an action is outside 0 … `num_actions` − 1, or they are not B.
        """
        actions = np.asarray(actions)
        actions_B = np.broadcast_to(actions, (self.batch,)) if actions.ndim == 0 else actions
        return self.rollout(actions_B[:, None])[:, 0]

    def rollout(self, actions_BF: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Generates one frame for each action, uint8 [B, F, H, W, C], in one call of the device.

        Raises:
            UserError: as `step`.
        """
        self._worlds, frames, predicted = self.generator.rollout(self._begun(), actions_BF)
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

    def _batch(self, frames, batch: int | None, where) -> int:
        """The number of worlds that a reset is for."""
        given = len(frames) if np.ndim(frames) == 5 else None
        wanted = batch if batch is not None else given or self.batch or 1
        if not isinstance(wanted, int | np.integer) or wanted < 1:
            raise UserError(f"batch={batch!r}: must be an integer, 1 or more")
        if given not in (None, wanted):
            raise UserError(f"batch={batch}, but frames are the prompts of {given} worlds")
        if where is not None and (np.shape(where) != (wanted,) or wanted != self.batch):
            raise UserError(
                f"where has the shape {np.shape(where)} for a reset of {wanted} worlds, but there "
                f"are {self.batch}: expected one bool for each of these"
            )
        return int(wanted)

    def _recorded(self, seeds: list[int], frames: int) -> tuple[np.ndarray, np.ndarray]:
        if self._starts is None:
            folder = self._starts_folder or shipped.DATA
            self._starts = Starts(folder, num_actions=self.num_actions)
        found = [self._starts.at(seed, frames) for seed in seeds]
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


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    if np.ndim(seed) == 0:
        sampler.check_seed(seed)
        return [(int(seed) + i) % _SEEDS for i in range(batch)]
    if len(seed) != batch:
        raise UserError(
            f"{len(seed)} seeds for {batch} worlds: expected one for each, or one number"
        )
    return [int(one) for one in seed]


def _for_all(frames: np.ndarray, actions, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt as [B, P, ...], and its actions as [B, P]."""
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim == 4:
        frames = np.broadcast_to(frames, (batch, *frames.shape))
    count = frames.shape[1] if frames.ndim == 5 else 1
    if actions is None:
        if count > 1:
            raise UserError(
                f"{count} prompt frames without actions: expected the action that led into each "
                "(−1 for the first)"
            )
        actions = np.full((batch, 1), NO_ACTION)
    actions = np.asarray(actions)
    return frames, np.broadcast_to(
        actions, (batch, *actions.shape)
    ) if actions.ndim == 1 else actions
