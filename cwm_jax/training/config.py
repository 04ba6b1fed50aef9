"""Settings of examples, loss, optimizer and how a step is computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cwm_jax import config_group
from cwm_jax.config_group import ConfigGroup, group, setting
from cwm_jax.errors import UserError
from cwm_jax.models import dit


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseLevelConfig(ConfigGroup):
    """Noise levels of training frames; `config.noise_levels`."""

    PATH = "config.noise_levels"

    top_share: float = setting(
        0.0, "of frames, that get the highest noise level: a frame's first step", least=0, most=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig(ConfigGroup):
    """Self-generated context; `config.context`. See `cwm_jax.training.self_generated`."""

    PATH = "config.context"

    share: float = setting(
        0.0, "of clips, whose context frames the network generates itself", least=0, most=1
    )
    steps: int = setting(
        0,
        "they are generated frame by frame, in so many denoising steps each; 0: all at once",
        least=0,
        most=16,
    )
    rounds: int = setting(
        1, "with `steps` 0: so many times over, each from the ones before", least=1, most=16
    )
    renoised: bool = setting(
        False, "with `steps` 0: rounds after the first noise generated frames, not real ones"
    )
    top_share: float = setting(
        0.0, "of those clips, in which all noise levels are the highest", least=0, most=1
    )
    lead: int = setting(
        0,
        "with `steps`: at most so many further frames are generated before each clip, a random "
        "number in each update; clips whose player is elsewhere by then get real context",
        least=0,
        most=1000,
    )
    start_noise: float = setting(
        0.0, "scale of the noise added to the frame that they begin with", least=0, most=1
    )
    persist_above: float = setting(
        0.0,
        "patches of generated context that differ by more (root mean square, colours in [-1, 1]) "
        "from what they should be are learned to stay as they are; 0: none",
        least=0,
        most=2,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig(ConfigGroup):
    """Changes of the training clips; `config.augment`."""

    PATH = "config.augment"

    mirror_share: float = setting(
        0.0, "of clips, with left and right exchanged (CoinRun's actions)", least=0, most=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(ConfigGroup):
    """Weights in the loss; `config.loss`."""

    PATH = "config.loss"

    weighting: str = setting(
        "velocity",
        "`velocity`: squared error of velocities; `ramp`: of clean samples, times 0.9 τ + 0.1, "
        "where τ is the share of signal of the noise level",
        choices=("velocity", "ramp"),
    )
    middle_weight: float = setting(
        1.0, "of pixels in the middle, where CoinRun keeps the player", least=0, most=1000
    )
    displacement_weight: float = setting(
        0.1, "of the cross-entropy of displacements", least=0, most=1000
    )
    outcome_weight: float = setting(
        0.1, "of the cross-entropies of reward and end of the episode", least=0, most=1000
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """Which examples are made of clips, and what counts in them: four groups of a config."""

    noise_levels: NoiseLevelConfig = group(NoiseLevelConfig)
    context: ContextConfig = group(ContextConfig)
    augment: AugmentConfig = group(AugmentConfig)
    loss: LossConfig = group(LossConfig)

    def changed(self, changes: Mapping[str, Any]) -> "ExampleConfig":
        """With other values of some settings, such as `{"context.steps": 2}`.

        Raises:
            UserError: there is no such setting in these groups, or no such value.
        """
        values = dataclasses.asdict(self)
        for name, value in changes.items():
            group, _, key = name.partition(".")
            if group not in values:
                raise UserError(f"there is no setting config.{name} in {', '.join(values)}")
            values[group] |= {key: value}
        build = lambda name: config_group.build(type(getattr(self, name)), values[name])
        return ExampleConfig(**{name: build(name) for name in values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ConfigGroup):
    """How parameters are updated; `config.optimizer`."""

    PATH = "config.optimizer"

    lr: float = setting(1e-4, "learning rate", least=0, most=1)
    weight_decay: float = setting(0.01, "on every parameter", least=0, most=1)
    warmup_steps: int = setting(
        2000, "updates in which the learning rate rises", least=0, most=10**9
    )
    decay_steps: int = setting(
        0, "the last so many of `schedule.max_steps` bring it down to 0", least=0, most=10**9
    )
    grad_clip: float = setting(1.0, "largest global norm of the gradient", least=1e-12, most=1e12)
    ema_decay: float = setting(
        0.0, "moving average of the parameters, sampled from; 0: none", least=0, most=0.999999
    )
    max_skipped_updates: int = setting(
        0,
        "updates whose loss or gradient is not finite that are passed over; one more: stop",
        least=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(ConfigGroup):
    """How an update is computed: memory and speed, not the result; `config.compute`."""

    PATH = "config.compute"

    remat: str = setting(
        "none", "what the backward pass computes again, to save memory", choices=dit.REMAT
    )
    accumulate_steps: int = setting(
        1, "parts in which a device goes through its clips, one by one", least=1
    )
    fsdp: int = setting(
        1, "devices that share one copy of parameters and optimizer; 1: a copy on each", least=1
    )
