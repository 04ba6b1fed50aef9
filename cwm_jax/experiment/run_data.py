"""The data of a run: training batches, validation clips, and the prompts of rollouts."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from cwm_jax.data import device_data, loader
from cwm_jax.errors import UserError
from cwm_jax.evaluation import lpips_weights, quick
from cwm_jax.experiment.settings import Settings
from cwm_jax.runtime import hosts, sharding
from cwm_jax.sampling import rollouts


class RunData:
    """Opened once for a run; all processes must open it.

    Attributes:
        batch_size: clips of an update, on all devices.
        train: endless training batches, with a position that checkpoints keep.
        validation, whole_validation: batches of some or all clips of the validation split.
        script: prompts and actions of the rollouts, the same each time; None if there are none.
        quick: clips of the quick evaluation; None if there is none.

    Raises:
        UserError: the data cannot be read, is not the same in all processes, or does not fit the
            settings.
    """

    def __init__(self, settings: Settings, mesh: Mesh | None):
        self._settings, self._mesh = settings, mesh
        self.batch_size = sharding.global_batch_size(
            settings.data.batch_size,
            settings.data.global_batch_size,
            parts=settings.compute.accumulate_steps,
        )
        self._shared = dict(
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_actions=settings.model.action_values,
        )
        self.train = loader.train_batches(
            settings.training_data,
            batch_size=self.batch_size,
            seed=settings.seed,
            make=self._kind_of_batches(),
            outcomes=settings.model.heads,
            **self._shared,
        )
        self.validation = self._val_batches(limit=settings.validation.batches * self.batch_size)
        self.whole_validation = self._val_batches(limit=None)
        # Hosts may have their own copies of the data, and one may be incomplete.
        val = {"clips": self.whole_validation.num_clips}
        hosts.check_same({"data": {"train": self.train.get_state(), "val": val}})
        self.script = self._script() if settings.rollouts.every_steps else None
        self.quick = self._quick() if settings.evaluation.every_steps else None

    def total_steps(self) -> int:
        """Updates of the whole run by `epochs` and `max_steps`.

        Raises `UserError` where the epochs end before the learning rate has decayed.
        """
        plan = self._settings.schedule
        total = plan.epochs * self.train.per_epoch
        steps = min(total, plan.max_steps or total)
        if self._settings.optimizer.decay_steps and steps < plan.max_steps:
            raise UserError(
                f"config.schedule.epochs={plan.epochs} end after {total} updates, before "
                f"config.schedule.max_steps={plan.max_steps}, at which decay_steps "
                f"bring the learning rate to 0: raise epochs or lower max_steps"
            )
        return steps

    def close(self) -> None:
        """Ends the processes and threads that read."""
        self.train.close()

    def _kind_of_batches(self) -> Callable[..., loader.TrainBatches]:
        if self._settings.data.on_device:
            return functools.partial(device_data.DeviceBatches, mesh=self._mesh)
        return loader.TrainBatches

    def _val_batches(self, *, limit: int | None) -> loader.EvalBatches:
        return loader.eval_batches(
            self._settings.data, "val", batch_size=self.batch_size, limit=limit, **self._shared
        )

    def _script(self) -> rollouts.Script:
        """The same clips each time, so that rollouts are comparable."""
        settings = self._settings
        with _setting_named("rollouts.frames", settings.rollouts.frames):
            return rollouts.write_script(
                settings.data,
                "val",
                count=settings.rollouts.count,
                frames=settings.rollouts.frames,
                n_prompt=settings.rollouts.n_prompt,
                num_actions=settings.model.action_values,
                seed=settings.seed,
            )

    def _quick(self) -> quick.Quick:
        settings = self._settings
        with _setting_named("evaluation.frames", settings.evaluation.frames):
            return quick.prepare(
                settings.data,
                "val",
                clips=settings.evaluation.clips,
                frames=settings.evaluation.frames,
                num_actions=settings.model.action_values,
                seed=settings.seed,
                lpips=None if jax.process_index() else lpips_weights.available(),
            )


def check_one_process(settings: Settings) -> None:
    """Refuses settings for one process only: each process has its own clock and memory."""
    for name, value in (
        ("schedule.minutes", settings.schedule.minutes),
        ("checkpoints.every_minutes", settings.checkpoints.every_minutes),
        ("data.on_device", settings.data.on_device),
    ):
        if value and jax.process_count() > 1:
            raise UserError(
                f"config.{name}={value:g} is for one process, and there are "
                f"{jax.process_count()}: set it to 0"
            )


@contextlib.contextmanager
def _setting_named(name: str, value: int) -> Iterator[None]:
    """Adds the setting to an error about validation clips."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (config.{name}={value})") from None
