"""Checks whether a run can resume from a checkpoint that was saved with another config."""

from collections.abc import Mapping
from typing import Any

from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError

# Settings that must match on resume. Differences of others, such as `lr`, are reported.
_FIXED = (
    *("seed", "init_from", "data.clip_len", "data.stride", "context.lead"),
    *("model.hidden_size", "model.depth", "model.num_heads", "model.patch_size"),
    *("model.image_size", "model.num_actions", "model.action_encoding", "model.max_frames"),
    *("model.history", "model.residual_scale", "model.warp_reach", "model.qk_norm"),
    *("model.heads", "model.prediction"),
    *("model.displacement_down", "model.displacement_across", "model.displacement_patch"),
)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between a checkpoint's config and this run's, a line for each setting.

    Raises:
        UserError: naming every setting that must match on resume.
    """
    before, after = _flat(saved), _flat(now)
    differing = {
        key: f"config.{key}={after.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
    fixed = [
        text
        for key, text in differing.items()
        if _must_match(key, before) or _has_lost_average(key, after, before)
    ]
    if fixed:
        listed = "\n".join(f"  {text}" for text in fixed)
        raise UserError(
            f"the checkpoint belongs to another run:\n{listed}\n"
            f"Use the old values to resume, or another --workdir for a new run."
        )
    return list(differing.values())


def _must_match(key: str, before: Mapping) -> bool:
    """Whether the setting must match; one that an imported checkpoint lacks need not."""
    return key in _FIXED and key in before


def _has_lost_average(key: str, after: Mapping, before: Mapping) -> bool:
    """Whether only one of the two keeps a moving average, which cannot start later."""
    return key == "optimizer.ema_decay" and bool(after.get(key)) != bool(before.get(key))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """This version's settings by name, as JSON has them."""
    flat = migration.BEFORE | dict(migration.flattened(migration.migrated(config)))
    return {name: _as_json(value) for name, value in flat.items()}


def _as_json(value):
    """The value after JSON: checkpoints hold lists where configs hold tuples."""
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value
