"""All settings of a run, checked once at the start and frozen.

`python -m cwm_jax.experiment.settings` prints their list, `docs/settings.md`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from cwm_jax import config_group
from cwm_jax.checkpoints import migration
from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.config_group import ConfigGroup, group, setting
from cwm_jax.data.config import DataConfig
from cwm_jax.diffusion import schedule
from cwm_jax.errors import UserError
from cwm_jax.experiment.wandb_run import WandbConfig
from cwm_jax.files import HUB, local_path
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels
from cwm_jax.training.config import (
    AugmentConfig,
    ComputeConfig,
    ContextConfig,
    ExampleConfig,
    LossConfig,
    NoiseLevelConfig,
    OptimizerConfig,
)
from cwm_jax.training.train_step import TrainSetup

_GROUP = dict(frozen=True, kw_only=True)
STAGED = tuple(field.name for field in dataclasses.fields(ExampleConfig))  # a stage may change them


@dataclasses.dataclass(**_GROUP)
class ScheduleConfig(ConfigGroup):
    """How long a run lasts, and what changes in its course; `config.schedule`."""

    PATH = "config.schedule"

    epochs: int = setting(10, "passes through all clips", least=1)
    max_steps: int = setting(0, "stop after so many updates; 0: after `epochs`", least=0)
    minutes: float = setting(
        0.0, "stop after so many minutes, compilation included; 0: no limit", least=0, most=1e6
    )
    decay_share: float = setting(
        0.45,
        "with `minutes`: the last share of them brings the learning rate down to 0",
        least=0,
        most=1,
    )
    stages: tuple = setting(
        (),
        "(share of the run, {setting: value, …}), …: changes of `noise_levels`, `context`, "
        '`augment` and `loss`, such as `((0.5, {"context.steps": 2}),)`; the run is `minutes` '
        "where they are set, else its updates",
    )


@dataclasses.dataclass(**_GROUP)
class DefaultSampler(ConfigGroup):
    """How a model generates where nothing else is asked for; `config.sampler`."""

    PATH = "config.sampler"

    ddim_steps: int = setting(
        10, "denoising steps for each frame", least=1, most=schedule.NUM_LEVELS
    )


@dataclasses.dataclass(**_GROUP)
class LoggingConfig(ConfigGroup):
    """What is logged, and where; `config.logging`."""

    PATH = "config.logging"

    every_steps: int = setting(50, "steps between two lines of metrics", least=1)
    tensorboard: bool = setting(False, "event files in the workdir, for TensorBoard")
    wandb: WandbConfig = group(WandbConfig)


@dataclasses.dataclass(**_GROUP)
class ValidationConfig(ConfigGroup):
    """Validation loss; `config.validation`."""

    PATH = "config.validation"

    every_steps: int = setting(5000, "steps between two validations; 0: none", least=0)
    batches: int = setting(50, "batches of each, with the same noise each time", least=1)


@dataclasses.dataclass(**_GROUP)
class QuickEvaluationConfig(ConfigGroup):
    """Short rollouts on validation clips, scored (`eval/…`); `config.evaluation`."""

    PATH = "config.evaluation"

    every_steps: int = setting(1000, "steps between two evaluations; 0: none", least=0)
    clips: int = setting(16, "validation clips", least=1)
    frames: int = setting(16, "generated after one given frame", least=1)


@dataclasses.dataclass(**_GROUP)
class RolloutConfig(ConfigGroup):
    """Videos of rollouts during training; `config.rollouts`."""

    PATH = "config.rollouts"

    every_steps: int = setting(1000, "steps between two rollouts; 0: none", least=0)
    n_prompt: int = setting(1, "real frames that a rollout starts from", least=1)
    frames: int = setting(16, "frames in all, the real ones included", least=1)
    count: int = setting(4, "rollouts in a video", least=1)


@dataclasses.dataclass(**_GROUP)
class CheckpointConfig(ConfigGroup):
    """When checkpoints are saved, and which stay; `config.checkpoints`."""

    PATH = "config.checkpoints"

    every_steps: int = setting(10_000, "steps between two checkpoints", least=1)
    every_minutes: float = setting(
        0.0, "a checkpoint also after so many minutes; 0: only by steps", least=0, most=1e6
    )
    keep: int = setting(3, "the newest so many stay …", least=1)
    keep_every_steps: int = setting(
        0, "… and those of steps that are multiples of this; 0: none", least=0
    )
    keep_best: int = setting(
        1, "… and so many of lowest `val/loss`, of those validated at their step", least=0
    )


@dataclasses.dataclass(**_GROUP)
class Settings(ConfigGroup):
    """All settings of a run; the defaults are the PyTorch original's where it has them."""

    PATH = "config"

    seed: int = setting(0, "of the parameters, the order of the data, and all noise", least=0)
    init_from: str = setting(
        "", "run or export whose parameters a new run begins with; empty: random ones"
    )
    distil_from: str = setting(
        "",
        "model whose generation in twice `sampler.ddim_steps` steps is learned; empty: none",
    )
    model: DiTConfig = group(DiTConfig)
    data: DataConfig = group(DataConfig)
    noise_levels: NoiseLevelConfig = group(NoiseLevelConfig)
    context: ContextConfig = group(ContextConfig)
    augment: AugmentConfig = group(AugmentConfig)
    loss: LossConfig = group(LossConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    schedule: ScheduleConfig = group(ScheduleConfig)
    compute: ComputeConfig = group(ComputeConfig)
    sampler: DefaultSampler = group(DefaultSampler)
    validation: ValidationConfig = group(ValidationConfig)
    evaluation: QuickEvaluationConfig = group(QuickEvaluationConfig)
    rollouts: RolloutConfig = group(RolloutConfig)
    checkpoints: CheckpointConfig = group(CheckpointConfig)
    logging: LoggingConfig = group(LoggingConfig)

    def __post_init__(self):
        super().__post_init__()
        self._check_lengths()
        self._check_learning()
        self._check_schedule()
        _ = self.stages  # checks them

    def _check_lengths(self) -> None:
        rollouts, clip_len = self.rollouts, self.data.clip_len
        if not rollouts.n_prompt < rollouts.frames:
            raise UserError(
                f"config.rollouts.frames={rollouts.frames} counts the prompt too, so it must be "
                f"more than config.rollouts.n_prompt={rollouts.n_prompt}"
            )
        for name, frames in (("data.clip_len", clip_len), ("rollouts.n_prompt", rollouts.n_prompt)):
            if frames > self.model.max_frames:
                raise UserError(
                    f"config.{name}={frames} is more than the network's window, "
                    f"config.model.max_frames={self.model.max_frames}"
                )
        if self.model.history and clip_len < 2:
            raise UserError(
                f"config.data.clip_len={clip_len} must be 2 or more where residuals are "
                f"generated (config.model.history={self.model.history}): one frame has none"
            )

    def _check_learning(self) -> None:
        steps, most = self.sampler.ddim_steps, schedule.NUM_LEVELS // 2
        if self.distil_from and steps > most:
            raise UserError(
                f"config.sampler.ddim_steps={steps} must be at most {most} "
                f"with config.distil_from: the teacher takes twice as many steps"
            )
        self._check_examples(self.examples)
        if self.context.lead and not (self.context.steps and self.context.share):
            raise UserError(
                f"config.context.lead={self.context.lead} needs config.context.steps ≥ 1 and share "
                f"> 0: it counts frames that are generated one by one before a clip"
            )

    def _check_examples(self, examples: ExampleConfig) -> None:
        """Checks the settings of one stage against the network."""
        share, mirror_share = examples.context.share, examples.augment.mirror_share
        if share and not self.model.history:
            raise UserError(
                f"config.context.share={share} needs config.model.history ≥ 1: "
                f"it shows the network context frames that it generated itself"
            )
        if mirror_share and not self.model.has_coinrun_actions:
            raise UserError(
                f"config.augment.mirror_share={mirror_share} needs CoinRun's actions "
                f"(config.model.num_actions={NUM_ACTIONS}, action_encoding='one_hot'): of others "
                f"it is unknown which exchange left and right; set it to 0"
            )

    def _check_schedule(self) -> None:
        minutes, decay = self.schedule.minutes, self.optimizer.decay_steps
        if minutes and decay:
            raise UserError(
                f"config.optimizer.decay_steps={decay} and config.schedule.minutes={minutes:g}: "
                f"with minutes the learning rate falls in the last config.schedule.decay_share of "
                f"them; set decay_steps to 0"
            )
        if decay and not self.schedule.max_steps:
            raise UserError(
                f"config.optimizer.decay_steps={decay} needs config.schedule.max_steps, the "
                f"updates of the whole run, of which these are the last"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Settings from a config's plain nested dict, of this version or an earlier one.

        Raises:
            UserError: for a key that is missing or does not exist, or a value out of range.
        """
        settings = config_group.build(cls, migration.migrated(config))
        models = {
            name: _model(getattr(settings, name), name) for name in ("init_from", "distil_from")
        }
        data = dataclasses.replace(settings.data, dir=_local(settings.data.dir, "data.dir"))
        return dataclasses.replace(settings, data=data, **models)

    def to_config(self) -> dict[str, Any]:
        """The plain nested dict."""
        return dataclasses.asdict(self)

    @property
    def examples(self) -> ExampleConfig:
        """The example settings of the first stage."""
        return ExampleConfig(**{name: getattr(self, name) for name in STAGED})

    def setup(self, mesh: Mesh | None) -> TrainSetup:
        """The setup of the first stage's training step; runs of any length share its program."""
        decays = bool(self.optimizer.decay_steps)
        return TrainSetup(
            network=self.model,
            optim=self.optimizer,
            compute=self.compute,
            examples=self.examples,
            max_steps=self.schedule.max_steps if decays else 0,
            mesh=mesh,
        )

    @property
    def stages(self) -> list[tuple[float, ExampleConfig]]:
        """For each stage, the share of the run at which it begins, and its settings.

        A stage keeps the settings of earlier stages.

        Raises:
            UserError: `schedule.stages` is not valid.
        """
        found = [(0.0, self.examples)]
        for stage in self.schedule.stages:
            begin, changes = _stage(stage)
            if not found[-1][0] < begin < 1:
                raise UserError(
                    f"config.schedule.stages: a stage begins at {begin:g}; shares of the run must "
                    f"rise, between 0 and 1"
                )
            found.append((begin, _changed(found[-1][1], changes)))
            self._check_examples(found[-1][1])
            context = found[-1][1].context
            if context.lead != self.context.lead:
                raise UserError(
                    f"config.schedule.stages: context.lead must stay {self.context.lead}, as the "
                    f"length of what is read depends on it"
                )
            if context.lead and not context.steps:
                raise UserError(
                    f"config.schedule.stages sets context.steps to 0, and "
                    f"config.context.lead={context.lead} needs 1 or more"
                )
        return found

    @property
    def training_data(self) -> DataConfig:
        """Of training clips with the frames of the longest lead before them."""
        return dataclasses.replace(self.data, clip_len=self.data.clip_len + self.context.lead)

    @property
    def more_passes(self) -> float:
        """Forward passes of an update besides the one with gradients."""
        context = self.context
        for_context = context.steps + 1 if context.steps else context.rounds
        for_context *= 1 + context.lead / 2 / self.data.clip_len  # a lead's mean is half
        return for_context * bool(context.share) + 2 * bool(self.distil_from)

    @property
    def rollout_sampler(self) -> SamplerConfig:
        """How rollouts during training are generated: exactly as the reference does."""
        return SamplerConfig(levels=ddim_levels(self.sampler.ddim_steps), window="exact")


def _stage(stage: Any) -> tuple[float, dict[str, Any]]:
    try:
        begin, changes = stage
        return float(begin), dict(changes)
    except (TypeError, ValueError):
        raise UserError(
            f"config.schedule.stages holds {stage!r}; a stage is (share of the run, settings), "
            f"such as (0.5, {{'context.steps': 2}})"
        ) from None


def _changed(examples: ExampleConfig, changes: Mapping[str, Any]) -> ExampleConfig:
    if other := [name for name in changes if str(name).partition(".")[0] not in STAGED]:
        raise UserError(
            f"config.schedule.stages sets {other[0]!r}; a stage may only set "
            f"{', '.join(f'{name}.…' for name in STAGED)}"
        )
    return examples.changed(changes)


def _model(named: str, name: str) -> str:
    return named if named.startswith(HUB) else _local(named, name)


def _local(path: str, name: str) -> str:
    return str(local_path(path, f"config.{name}")) if path else path


def reference() -> str:
    """The list of all settings as a page in Markdown."""
    plain = [f for f in dataclasses.fields(Settings) if not config_group.is_group(f.type)]
    lines = [_REFERENCE_HEAD, *(_row((field.name, field)) for field in plain)]
    for field in dataclasses.fields(Settings):
        if config_group.is_group(field.type):
            lines += ["", f"## {field.name}", "", field.type.__doc__.splitlines()[0], ""]
            lines += [*_TABLE_HEAD, *map(_row, config_group.listed(field.type))]
    return "\n".join(lines) + "\n"


_TABLE_HEAD = ("| Setting | Default | Meaning |", "|---|---|---|")
_REFERENCE_HEAD = "\n".join(
    (
        "# Settings",
        "",
        "Every setting of `train.py`, with its default, from which `configs/*.py` depart. Any can "
        "be given on the",
        "command line: `python train.py --config configs/small.py --config.optimizer.lr=3e-4`. "
        "This page is made by",
        "`python -m cwm_jax.experiment.settings > docs/settings.md`.",
        "",
        *_TABLE_HEAD,
    )
)


def _row(named: tuple[str, dataclasses.Field]) -> str:
    name, field = named
    rule = field.metadata
    default = f"`{field.default!r}`" if isinstance(field.default, str) else f"{field.default!r}"
    choices = f" (one of {', '.join(f'`{each}`' for each in rule['choices'])})" * bool(
        rule["choices"]
    )
    return f"| `{name.removeprefix('config.')}` | {default} | {rule['meaning']}{choices} |"


if __name__ == "__main__":
    print(reference(), end="")
