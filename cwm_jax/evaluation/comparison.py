"""Several measurements in one table, if they were made under the same conditions."""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from cwm_jax.errors import UserError
from cwm_jax.evaluation import paired, protocol

_MEASURES = {
    "psnr": "PSNR, dB,",
    "ssim": "SSIM",
    "psnr_motion": "PSNR of motion, dB,",
    "lpips": "LPIPS (lower is better),",
}
_BESIDE = {
    "model": "{}",
    "copy_last": "  copy last: {}",
    "reconstruction": "  reconstruction: {}",
    "blur": "  blurred real frames: {}",
}
_READ_FROM = {"drawn": "generated frames", "real": "real frames", "shuffled": "chance"}


def read(path: Path) -> dict:
    """The content of a metrics.json.

    Raises:
        UserError: the file cannot be read, or is no metrics.json.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("protocol"), dict):
        raise UserError(f"{path} has no protocol: it was not written by evaluate.py")
    return results


def table(named: Sequence[tuple[str, Mapping]], *, across: Collection[str] = ()) -> str:
    """The headline numbers of measurements, one column each; floors are among the rows.

    Below it, the cases where PSNR or SSIM ranks two of them, or the only one and a floor,
    differently from LPIPS.

    Args:
        across: conditions of `protocol.VARIABLE` that may differ, and are rows of the table.

    Raises:
        UserError: protocols differ in other conditions; the message lists them.
    """
    if unknown := sorted(set(across) - set(protocol.VARIABLE)):
        raise UserError(
            f"--across {','.join(unknown)}: only conditions of generation may differ: "
            f"{', '.join(protocol.VARIABLE)}"
        )
    (first_name, first), *others = named
    for name, results in others:
        found = protocol.differences(first["protocol"], results["protocol"], across=across)
        if found:
            raise UserError(
                f"{first_name} and {name} were not measured under the same conditions, so their "
                "numbers do not compare. They differ in\n  " + "\n  ".join(found)
            )
    columns = [
        {name: condition(results["protocol"].get(name, "–")) for name in across}
        | dict(rows(results))
        | dict(_minus(results, first, first_name))
        for _, results in named
    ]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    cells = [["", *(name for name, _ in named)]]
    cells += [[label, *(column.get(label, "–") for column in columns)] for label in labels]
    ranked = [*pairs_ranked_otherwise(named)] if others else [*ranked_otherwise(first)]
    return aligned(cells) + "".join(f"\n{line}" for line in ranked)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column to the left."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _minus(results: Mapping, first: Mapping, name: str) -> Iterator[tuple[str, str]]:
    """(label, value) of the differences from the first measurement, clip by clip."""
    if results is first:
        return
    for prompt, found in _differences(results, first):
        for measure in found:
            for horizon in shown(found[measure]):
                where = f"frames 1…{horizon} from {prompt.removeprefix('prompt_')}"
                value = interval(found[measure][horizon], paired.DIGITS[measure])
                yield f"{paired.NAMES[measure]} minus that of {name}, {where}", value


def _differences(one: Mapping, other: Mapping) -> Iterator[tuple[str, paired.Differences]]:
    """For each prompt, one measurement minus another; none for files without means by clip."""
    for prompt, sides in one["rollout"].items():
        beside = other["rollout"][prompt]
        if "by_clip" in sides and "by_clip" in beside:
            yield prompt, paired.difference(sides["by_clip"], beside["by_clip"])


def pairs_ranked_otherwise(named: Sequence[tuple[str, Mapping]]) -> Iterator[str]:
    """Where PSNR or SSIM ranks two measurements of the same clips differently from LPIPS."""
    for (one, results), (other, beside) in itertools.combinations(named, 2):
        for prompt, found in _differences(results, beside):
            yield from _contradictions(prompt, found, one=one, other=other)


def ranked_otherwise(results: Mapping) -> Iterator[str]:
    """Where PSNR or SSIM ranks the model and a floor differently from LPIPS."""
    for prompt, sides in results["rollout"].items():
        for floor, found in sides.get("model_minus", {}).items():
            yield from _contradictions(prompt, found, one="the model", other=paired.FLOORS[floor])


def _contradictions(prompt: str, found: paired.Differences, **sides: str) -> Iterator[str]:
    horizons = shown(found["psnr"])
    for sentence in paired.contradictions(found, horizons, **sides):
        yield f"{prompt.removeprefix('prompt_')} given, {sentence}"


def condition(value) -> str:
    """A condition in short form: of many noise levels, the first, the last and their number."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 4:
        return f"{len(value)}: {value[0]} … {value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def rows(results: Mapping) -> Iterator[tuple[str, str]]:
    """(label, value) of every headline number of a metrics.json, or of fresh results."""
    yield "checkpoint", f"step {results['checkpoint']['step']}"
    for prompt, sides in results["rollout"].items():
        given = prompt.removeprefix("prompt_")
        for horizon in shown(sides["model"]["psnr"]["mean"]):
            for measure, name in _MEASURES.items():
                where, digits = f"frames 1…{horizon} from {given}", paired.DIGITS[measure]
                for side, label in _BESIDE.items():
                    if measure in sides.get(side, ()):
                        value = interval(sides[side][measure]["mean"][horizon], digits)
                        yield f"{label.format(name)} {where}", value
            for floor, found in sides.get("model_minus", {}).items():
                if "lpips" in found:
                    value = interval(found["lpips"][horizon], paired.DIGITS["lpips"])
                    yield f"  LPIPS minus that of {paired.FLOORS[floor]}, {where}", value
    for horizon in shown(results["control"]["delta_psnr"]["mean"]):
        value = results["control"]["delta_psnr"]["mean"][horizon]
        yield f"ΔPSNR frames 1…{horizon}, dB", interval(value)
    read = results["probe"]
    for name, label in _READ_FROM.items():
        yield f"actions read back, {label}", interval(read[name]["accuracy"])
    for key in read["keys_of_real"]:
        for name, label in _READ_FROM.items():
            found = read[name]["keys"][key]
            value = f"{number(found['read'])} (falsely {number(found['false'])})"
            yield f"  {key} read where pressed, {label}", value
        yield f"  {key}, share of that on real frames", number(read["keys_of_real"][key])
    yield "control, 0 chance … 1 real", number(read["control"])
    drift = results["drift"]
    yield f"frames to collapse, of {drift['frames']}", interval(drift["frames_to_collapse"], 0)
    yield "survived to the end", number(drift["survived"])
    if nearest := drift.get("nearest_real"):
        yield "LPIPS to the nearest of the level's real frames", interval(nearest["mean"], 3)
        yield "  of real frames of the same clips", interval(nearest["real"], 3)
        lasted = interval(nearest["frames_to_leave"], 0)
        yield f"frames before it leaves the level, of {drift['frames']}", lasted
    yield from _of_uncertainty(results.get("uncertainty"))
    yield from _of_videos(results.get("videos"))
    for name, value in results.get("single_step", {}).items():
        yield f"{name} (single step)", number(value, 4)


_RANKS = {
    "where": "over patches of a frame",
    "beyond": "the same beyond the model's own change",
    "when": "over frames of a clip",
    "which": "over clips",
}


def _of_uncertainty(found: Mapping | None) -> Iterator[tuple[str, str]]:
    """Rank correlations of uncertainty and error; other seeds and frames are other rows."""
    if not found:
        return
    where = f"{found['frames']} frames, {found['seeds']} seeds"
    for sign in ("spread", "instability"):
        if sign in found:
            for kind, label in _RANKS.items():
                value = interval(found[sign][kind])
                yield f"{sign} and error, rank correlation {label}, {where}", value


def _of_videos(videos: Mapping | None) -> Iterator[tuple[str, str]]:
    """KVD and FVD, with their own conditions: they are measured on other clips."""
    if not videos:
        return
    given, frames, digest = videos["given"], videos["frames"], videos["digest"]
    where = f"{videos['clips']} clips of {frames} frames from {given} ({digest[:6]})"
    kvd, fvd = videos["kvd"], videos["fvd"]
    yield f"KVD (lower is better), {where}", interval(kvd["model"], 3)
    yield f"  real clips against other real ones, {where}", interval(kvd["floor"], 3)
    yield f"  model minus real clips, {where}", interval(kvd["model_minus_floor"], 3)
    yield f"FVD (lower is better), {where}", number(fvd["model"], 1)
    yield f"  FVD of real clips against other real ones, {where}", number(fvd["floor"], 1)


def shown(by_horizon: Mapping) -> list[str]:
    """Horizon 10, which is published for other models, and the longest."""
    longest = max(by_horizon, key=int)
    return ["10", longest] if "10" in by_horizon and longest != "10" else [longest]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def interval(value: Mapping, digits: int = 2) -> str:
    mean, low, high = (number(value[name], digits) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
