"""A config file's settings, checked once at the start and frozen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.data.loader import DataConfig
from cwm_jax.diffusion import schedule
from cwm_jax.errors import UserError
from cwm_jax.experiment.wandb_run import WandbConfig
from cwm_jax.files import HUB, local_path
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels
from cwm_jax.training.examples import NoiseConfig
from cwm_jax.training.train_step import OptimizerConfig, StepConfig, TrainSetup


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where a run is logged beside `metrics.jsonl` and W&B (`config.logging`)."""

    tensorboard: bool = False  # event files in the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run; `configs/base.py` says what each means."""

    seed: int
    init_from: str
    distil_from: str
    model: DiTConfig
    data: DataConfig
    noise: NoiseConfig
    wandb: WandbConfig
    logging: LoggingConfig

    batch_size: int
    global_batch_size: int
    accumulate_steps: int
    remat: str
    fsdp: int
    epochs: int
    max_steps: int
    minutes: float
    decay_share: float
    stages: tuple
    lr: float
    weight_decay: float
    warmup_steps: int
    decay_steps: int
    grad_clip: float
    ema_decay: float

    log_every_steps: int
    val_every_steps: int
    val_batches: int
    eval_every_steps: int
    eval_clips: int
    eval_frames: int
    rollout_every_steps: int
    ckpt_every_steps: int
    ckpt_every_minutes: float
    keep_checkpoints: int
    keep_every_steps: int
    keep_best: int
    max_skipped_updates: int

    ddim_steps: int
    n_prompt: int
    rollout_frames: int
    n_rollout_samples: int

    def __post_init__(self):
        zero_allowed = ("seed", "global_batch_size", "max_steps", "warmup_steps", "decay_steps")
        zero_allowed += ("keep_every_steps", "keep_best", "max_skipped_updates")
        zero_allowed += ("val_every_steps", "eval_every_steps", "rollout_every_steps")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in zero_allowed else 1
            if field.type is int and value < least:
                raise UserError(f"config.{field.name}={value}: must be {least} or more")
        if not self.n_prompt < self.rollout_frames:
            raise UserError(
                f"config.rollout_frames={self.rollout_frames} counts the prompt too, so it must be "
                f"more than config.n_prompt={self.n_prompt}"
            )
        for name, frames in (("data.clip_len", self.data.clip_len), ("n_prompt", self.n_prompt)):
            if frames > self.model.max_frames:
                raise UserError(
                    f"config.{name}={frames} is more than the network's window, "
                    f"config.model.max_frames={self.model.max_frames}"
                )
        if self.model.history and self.data.clip_len < 2:
            raise UserError(
                f"config.data.clip_len={self.data.clip_len} must be 2 or more where changes are "
                f"drawn (config.model.history={self.model.history}): one frame shows none"
            )
        if self.distil_from and self.ddim_steps > schedule.NUM_LEVELS // 2:
            raise UserError(
                f"config.ddim_steps={self.ddim_steps} must be at most {schedule.NUM_LEVELS // 2} "
                f"with config.distil_from: the teacher takes twice as many steps"
            )
        if self.noise.own_share and not self.model.history:
            raise UserError(
                f"config.noise.own_share={self.noise.own_share} needs config.model.history ≥ 1: "
                f"it shows the network earlier frames of its own drawing"
            )
        if self.noise.mirror_share and not self.model.has_coinrun_actions:
            raise UserError(
                f"config.noise.mirror_share={self.noise.mirror_share} needs CoinRun's actions "
                f"(config.model.num_actions={NUM_ACTIONS}, action_encoding='one_hot'): of others "
                f"it is not known which exchange left and right"
            )
        self._check_clock()
        _ = self.optimizer, self.step, self.sampler, self.noises  # these check their own fields

    def _check_clock(self) -> None:
        most = {"minutes": 1e6, "ckpt_every_minutes": 1e6, "decay_share": 1}
        for name, high in most.items():
            if not 0 <= getattr(self, name) <= high:
                raise UserError(f"config.{name}={getattr(self, name)}: must be 0…{high:g}")
        if self.minutes and self.decay_steps:
            raise UserError(
                f"config.decay_steps={self.decay_steps} and config.minutes={self.minutes:g}: with "
                f"minutes the learning rate falls in the last config.decay_share of them; set "
                f"decay_steps to 0"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Settings from a config's plain nested dict.

        Raises:
            UserError: for a key that is missing or does not exist, or a value out of range.
        """
        sections = {"model": DiTConfig, "data": DataConfig, "noise": NoiseConfig}
        sections |= {"wandb": WandbConfig, "logging": LoggingConfig}
        values = dict(config)
        for name, section in sections.items():
            values[name] = _build(section, values.get(name, {}), f"config.{name}.")
        settings = _build(cls, values, "config.")
        models = {
            name: _model(getattr(settings, name), name) for name in ("init_from", "distil_from")
        }
        data = dataclasses.replace(settings.data, dir=_local(settings.data.dir, "data.dir"))
        return dataclasses.replace(settings, data=data, **models)

    @property
    def optimizer(self) -> OptimizerConfig:
        names = (field.name for field in dataclasses.fields(OptimizerConfig))
        return OptimizerConfig(**{name: getattr(self, name) for name in names})

    @property
    def step(self) -> StepConfig:
        return StepConfig(remat=self.remat, accumulate_steps=self.accumulate_steps)

    def setup(self, mesh: Mesh | None) -> TrainSetup:
        """What the training step of the first stage is compiled for."""
        how = dict(step=self.step, noise=self.noise, mesh=mesh)
        return TrainSetup(network=self.model, optim=self.optimizer, **how)

    @property
    def noises(self) -> list[tuple[float, NoiseConfig]]:
        """Of each stage the share of the run with which it begins, and its settings of noise.

        A stage keeps what the ones before have set.

        Raises:
            UserError: `stages` are not as `configs/base.py` describes them.
        """
        found = [(0.0, self.noise)]
        for stage in self.stages:
            try:
                begin, changes = stage
                begin, changes = float(begin), dict(changes)
            except (TypeError, ValueError):
                raise UserError(
                    f"config.stages holds {stage!r}; a stage is (share of the run, settings), "
                    f"such as (0.5, {{'noise.own_passes': 4}})"
                ) from None
            if not found[-1][0] < begin < 1:
                raise UserError(
                    f"config.stages: a stage begins at {begin:g}; shares of the run must rise, "
                    f"between 0 and 1"
                )
            if other := [name for name in changes if not name.startswith("noise.")]:
                raise UserError(
                    f"config.stages sets {other[0]!r}; a stage may only set config.noise.…"
                )
            values = {name.removeprefix("noise."): value for name, value in changes.items()}
            values = dataclasses.asdict(found[-1][1]) | values
            found.append((begin, _build(NoiseConfig, values, "config.noise.")))
        return found

    @property
    def more_passes(self) -> int:
        """Forward passes of an update beside the one that is learned from."""
        noise = self.noise
        of_context = noise.own_steps + 1 if noise.own_steps else noise.own_passes
        return of_context * bool(noise.own_share) + 2 * bool(self.distil_from)

    @property
    def sampler(self) -> SamplerConfig:
        """How rollouts during training are drawn: exactly as the reference does."""
        return SamplerConfig(levels=ddim_levels(self.ddim_steps), window="exact")


def _local(path: str, name: str) -> str:
    return str(local_path(path, f"config.{name}")) if path else path


def _model(named: str, name: str) -> str:
    return named if named.startswith(HUB) else _local(named, name)


def _build(cls, values: Mapping[str, Any], prefix: str):
    """`cls(**values)`, where an error names the key that is unknown, missing or mistyped."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"there is no setting {prefix}{unknown[0]}; see configs/base.py for all")
    if missing := sorted(set(fields) - set(values)):
        raise UserError(f"the config lacks {prefix}{missing[0]}; see configs/base.py")
    checked = {
        name: _typed(values[name], field.type, prefix + name) for name, field in fields.items()
    }
    return cls(**checked)


def _typed(value, wanted, name: str):
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is bool and not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, not {value!r}")
    if wanted in (int, float, str) and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise UserError(f"{name} must be {wanted.__name__}, not {value!r}")
    return value
