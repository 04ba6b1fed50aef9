"""Migrates configs of earlier versions to the settings of this one.

Checkpoints, exports and config files keep the whole config that they were made with. `RENAMED`
lists settings that were renamed since; `BEFORE` lists settings that did not exist, with the value
that is equivalent to their absence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# Version 0.1 → 0.2, which put settings into groups. Keys are below `config.`.
RENAMED = {
    "model.change_scale": "model.residual_scale",
    "model.motion": "model.warp_reach",
    "batch_size": "data.batch_size",
    "global_batch_size": "data.global_batch_size",
    **{f"noise.{name}": f"context.{name.removeprefix('own_')}" for name in (
        "own_share", "own_steps", "own_renoised", "own_top_share", "own_start_noise",
        "persist_above",
    )},
    "noise.own_passes": "context.rounds",
    "noise.top_share": "noise_levels.top_share",
    "noise.mirror_share": "augment.mirror_share",
    "noise.middle_weight": "loss.middle_weight",
    "noise.displacement_weight": "loss.displacement_weight",
    **{name: f"optimizer.{name}" for name in (
        "lr", "weight_decay", "warmup_steps", "decay_steps", "grad_clip", "ema_decay",
        "max_skipped_updates",
    )},
    **{name: f"schedule.{name}" for name in (
        "epochs", "max_steps", "minutes", "decay_share", "stages",
    )},
    **{name: f"compute.{name}" for name in ("remat", "accumulate_steps", "fsdp")},
    "log_every_steps": "logging.every_steps",
    "wandb.project": "logging.wandb.project",
    "wandb.entity": "logging.wandb.entity",
    "wandb.mode": "logging.wandb.mode",
    "val_every_steps": "validation.every_steps",
    "val_batches": "validation.batches",
    "eval_every_steps": "evaluation.every_steps",
    "eval_clips": "evaluation.clips",
    "eval_frames": "evaluation.frames",
    "ckpt_every_steps": "checkpoints.every_steps",
    "ckpt_every_minutes": "checkpoints.every_minutes",
    "keep_checkpoints": "checkpoints.keep",
    "keep_every_steps": "checkpoints.keep_every_steps",
    "keep_best": "checkpoints.keep_best",
    "rollout_every_steps": "rollouts.every_steps",
    "rollout_frames": "rollouts.frames",
    "n_rollout_samples": "rollouts.count",
    "n_prompt": "rollouts.n_prompt",
    "ddim_steps": "sampler.ddim_steps",
    "playable_steps": "sampler.playable_steps",
}  # fmt: skip

BEFORE = {
    "logging.tensorboard": False,
    "init_from": "",
    "distil_from": "",
    "model.history": 0,
    "model.residual_scale": 0.2,
    "model.warp_reach": 0,
    "model.action_encoding": "one_hot",
    "model.attention": "auto",
    "model.time_attention": "same",
    "model.norm": "auto",
    "model.mlp": "auto",
    "model.displacement_down": 0,
    "model.displacement_across": 0,
    "model.displacement_patch": 4,
    "model.warp_sharpness": 1.0,
    "model.still_threshold": 0.0,
    "model.qk_norm": False,
    "model.heads": False,
    "model.prediction": "velocity",
    "data.global_batch_size": 0,
    "data.on_device": 0,
    "noise_levels.top_share": 0.0,
    "context.share": 0.0,
    "context.steps": 0,
    "context.rounds": 1,
    "context.renoised": False,
    "context.top_share": 0.0,
    "context.lead": 0,
    "context.start_noise": 0.0,
    "context.persist_above": 0.0,
    "augment.mirror_share": 0.0,
    "loss.weighting": "velocity",
    "loss.middle_weight": 1.0,
    "loss.displacement_weight": 0.1,
    "loss.outcome_weight": 0.1,
    "optimizer.decay_steps": 0,
    "schedule.minutes": 0.0,
    "schedule.decay_share": 0.45,
    "schedule.stages": [],
    "checkpoints.every_minutes": 0.0,
}


def migrated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with this version's names, as a nested dict; one of this version is unchanged.

    In the groups that it has, settings that did not exist are filled in. Where both an old and a
    new name are set, as in a user's config file that changes settings of
    `configs/base.py`, the old name counts: it was set last. Unknown keys stay.
    """
    flat = dict(flattened(config))
    given = {RENAMED.get(name, name): value for name, value in flat.items() if name not in RENAMED}
    given |= {RENAMED[name]: value for name, value in flat.items() if name in RENAMED}
    if "schedule.stages" in given:
        given["schedule.stages"] = _stages(given["schedule.stages"])
    groups = {name.partition(".")[0] for name in given if "." in name}
    filled = {name: v for name, v in BEFORE.items() if name.partition(".")[0] in groups}
    return nested(filled | given)


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("model.depth", 6) and so on, of every setting of a nested config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    config: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, key = name.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return config


def _stages(stages: Any) -> Any:
    """Stages with this version's names; invalid ones are unchanged, to be refused later."""
    try:
        return [
            [begin, {RENAMED.get(name, name): value for name, value in dict(changes).items()}]
            for begin, changes in stages
        ]
    except (TypeError, ValueError):
        return stages
