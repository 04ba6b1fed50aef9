"""`card.md`: how an exported model was trained, and what was measured of it, as Markdown."""

import importlib.metadata
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cwm_jax.errors import UserError
from cwm_jax.evaluation import comparison, lpips_weights, protocol
from cwm_jax.experiment import metrics_file

_HORIZONS = ("1", "2", "5", "10", "16", "31", "32")


def text(facts: Mapping[str, str], measured: Mapping[int, Mapping], notes: Sequence[str]) -> str:
    """The card.

    Args:
        facts: `training`.
        measured: a metrics.json of `evaluate.py` for each number of denoising steps.
        notes: sentences on what was not measured.
    """
    lines = ["# Model card", "", "## Training", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "## Measured", ""]
    if measured:
        lines += [_conditions(next(iter(measured.values()))), "", *_table(measured), ""]
    if measured and not any("lpips" in _sides(found)["model"] for found in measured.values()):
        lines += [f"LPIPS was not measured: its weights are absent; `{lpips_weights.FETCH}`.", ""]
    return "\n".join([*lines, *notes, *([""] if notes else [])])


def training(shapes: Mapping, meta: Mapping, metrics: Path, device: str) -> dict[str, str]:
    """How a model was trained.

    Args:
        shapes, meta: of its export, see `weights.describe`.
        metrics: the run's `metrics.jsonl`.
        device: in words.
    """
    data, steps = meta["config"]["data"], meta["step"]
    clips = data.get("global_batch_size") or data["batch_size"]
    facts = {
        "parameters": f"{sum(map(math.prod, shapes.values())):,}",
        "updates": f"{steps:,}",
        "training frames": f"{steps * clips * data['clip_len']:,} ({clips} clips of "
        f"{data['clip_len']} an update)",
    }
    if minutes := _minutes(metrics, steps):
        facts["minutes"] = f"{minutes:.1f}, compilation included"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy")]
    versions = [f"Python {platform.python_version()}", *versions]
    return facts | {
        "data": str(data["dir"]),
        "device": device,
        "code": f"cwm_jax {protocol.code_version()}",
        "versions": ", ".join(versions),
    }


def _minutes(metrics: Path, steps: int) -> float | None:
    """The training time at these steps, None where it was not recorded."""
    try:
        places, minutes = metrics_file.read_series(metrics)["train/minutes"]
    except (UserError, KeyError):
        return None
    until = minutes[places <= steps]
    return float(np.nanmax(until)) if until.size else None


def _sides(found: Mapping) -> Mapping:
    return next(iter(found["rollout"].values()))


def _conditions(found: Mapping) -> str:
    of, clips = found["protocol"], found["clips"]["used"]
    given = ", ".join(map(str, of["n_prompt"]))
    return (
        f"Means over {clips} clips of the split {of['split']}, from {given} given frames, with "
        f"95 % intervals, on {found['device']}. Few clips: enough to see that training worked, too "
        f"few to compare models with. S is the number of denoising steps for each frame; the "
        f"floor repeats the last given frame."
    )


def _table(measured: Mapping[int, Mapping]) -> Iterator[str]:
    by_steps = dict(sorted(measured.items()))
    yield "| | floor | " + " | ".join(f"S = {steps}" for steps in by_steps) + " |"
    yield "|---" * (2 + len(by_steps)) + "|"
    columns = [dict(_rows(found)) for found in by_steps.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    floors = dict(_floors(next(iter(by_steps.values()))))
    for label in labels:
        cells = [column.get(label, "–") for column in columns]
        yield f"| {label} | {floors.get(label, '')} | " + " | ".join(cells) + " |"


def _at_horizons(sides: Mapping, side: str) -> Iterator[tuple[str, str]]:
    for name, label, digits in (("psnr", "PSNR, dB,", 2), ("lpips", "LPIPS", 3)):
        at = sides[side].get(name, {"at": {}})["at"]
        for horizon in filter(at.__contains__, _HORIZONS):
            yield f"{label} at frame {horizon}", comparison.interval(at[horizon], digits)


def _floors(found: Mapping) -> Iterator[tuple[str, str]]:
    yield from _at_horizons(_sides(found), "copy_last")


def _rows(found: Mapping) -> Iterator[tuple[str, str]]:
    yield from _at_horizons(_sides(found), "model")
    for key, share in found["probe"]["keys_of_real"].items():
        value = "–" if share is None else f"{100 * share:.0f} %"
        yield f"{key}, as readable as in the game", value
    drift = found["drift"]
    sharpness = drift["by_window"]["sharpness"]["mean"]
    ends = ", ".join(comparison.number(sharpness[place]) for place in (0, -1))
    yield f"sharpness of the first and last 16 of {drift['frames']} frames; 1: real", ends
    collapse = comparison.interval(drift["frames_to_collapse"], 0)
    yield f"frames to collapse, median, of {drift['frames']}", collapse
