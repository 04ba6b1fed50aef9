"""Whether a run may go on from a checkpoint that was saved under another config."""

from collections.abc import Mapping
from typing import Any

from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError

# Settings that make it another run. Some others change the curve, such as the
# learning rate, and are reported.
_FIXED = (
    *("seed", "init_from", "data.clip_len", "data.stride"),
    *("model.hidden_size", "model.depth", "model.num_heads", "model.patch_size"),
    *("model.image_size", "model.num_actions", "model.action_encoding", "model.max_frames"),
    *("model.history", "model.residual_scale", "model.warp_reach", "model.qk_norm"),
    *("model.displacement_down", "model.displacement_across", "model.displacement_patch"),
)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's config and this run's, a line for each setting.

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
        if _makes_it_another(key, before) or _has_lost_average(key, after, before)
    ]
    if fixed:
        told = "\n".join(f"  {text}" for text in fixed)
        raise UserError(
            f"the checkpoint belongs to another run:\n{told}\n"
            f"Use the old values to go on, or another --workdir to start anew."
        )
    return list(differing.values())


def _makes_it_another(key: str, before: Mapping) -> bool:
    """Whether such a difference may not be; what an imported checkpoint does not tell may."""
    return key in _FIXED and key in before


def _has_lost_average(key: str, after: Mapping, before: Mapping) -> bool:
    """Whether only one of the two keeps a moving average, which cannot start midway."""
    return key == "optimizer.ema_decay" and bool(after.get(key)) != bool(before.get(key))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """This version's settings by name, as JSON has them."""
    flat = migration.BEFORE | dict(migration.flattened(migration.migrated(config)))
    return {name: _as_json(value) for name, value in flat.items()}


def _as_json(value):
    """What JSON makes of it: checkpoints hold lists where configs hold tuples."""
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value
