"""Whether a run may go on from a checkpoint that was saved under another config."""

from collections.abc import Iterator, Mapping
from typing import Any

from cwm_jax.errors import UserError

# Settings that make it another run. Of the rest, some change the curve (`lr`), and are said.
_FIXED = (
    *("seed", "model.hidden_size", "model.depth", "model.num_heads", "model.patch_size"),
    *("model.image_size", "model.num_actions", "model.max_frames", "model.history"),
    *("model.change_scale", "model.motion", "model.action_encoding"),
    *("model.displacement_down", "model.displacement_across", "model.displacement_patch"),
    *("model.qk_norm", "model.heads"),
    *("data.clip_len", "data.stride", "init_from"),
)
# What settings were that are younger than the checkpoints that may lack them.
_BEFORE = {"init_from": "", "model.history": 0, "model.change_scale": 0.2, "model.motion": 0}
_BEFORE |= {"distil_from": ""}
_BEFORE |= {"decay_steps": 0, "noise.top_share": 0.0, "noise.own_share": 0.0, "noise.own_passes": 1}
_BEFORE |= {"model.action_encoding": "one_hot"}
_BEFORE |= {"noise.own_renoised": False, "noise.displacement_weight": 0.1}
_BEFORE |= {"noise.own_top_share": 0.0, "noise.mirror_share": 0.0, "noise.middle_weight": 1.0}
_BEFORE |= {"model.displacement_down": 0, "model.displacement_across": 0}
_BEFORE |= {"model.displacement_patch": 4, "model.qk_norm": False, "model.norm": "auto"}
_BEFORE |= {"noise.own_steps": 0, "noise.own_start_noise": 0.0, "noise.persist_above": 0.0}
_BEFORE |= {"minutes": 0.0, "decay_share": 0.45, "stages": [], "ckpt_every_minutes": 0.0}
_BEFORE |= {"data.on_device": 0, "model.heads": False, "noise.outcome_weight": 0.1}


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's config and this run's, a line for each setting.

    Raises:
        UserError: naming every setting without which the checkpoint cannot be gone on from.
    """
    before, after = _BEFORE | dict(_flat(saved)), _BEFORE | dict(_flat(now))
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
    return key == "ema_decay" and bool(after.get(key)) != bool(before.get(key))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _as_json(value)


def _as_json(value):
    """What JSON makes of it: checkpoints hold lists where configs hold tuples."""
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value
