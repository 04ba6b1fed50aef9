"""Which numbers of denoising steps, and which window, a model should be used with.

A setting is good enough to play with if its LPIPS is certainly below that of copying the last given
frame, each key can be read off its frames, and its rollouts do not certainly collapse early. The
best one is that of least LPIPS among those; where the difference from a cheaper one is not certain,
the cheaper one.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cwm_jax.checkpoints import bundle, weights
from cwm_jax.errors import UserError
from cwm_jax.evaluation import comparison, paired

READABLE = 0.5  # of what real frames show of a key
LASTING = 0.5  # of the frames to collapse of the setting that lasts longest


class Setting(NamedTuple):
    """A way of generating frames, and what was measured of it."""

    steps: int  # denoising steps a frame
    window: str
    results: Mapping  # as in metrics.json, with LPIPS

    @property
    def name(self) -> str:
        return f"S = {self.steps}, {self.window}"


class Judged(NamedTuple):
    """A setting and what keeps it from being good enough to play with (nothing: empty)."""

    setting: Setting
    faults: tuple[str, ...]


class Answer(NamedTuple):
    """What a model's config should say."""

    window: str
    ddim_steps: int
    playable_steps: tuple[int, ...]  # rising, with this window

    def __str__(self) -> str:
        steps = f"ddim_steps = {self.ddim_steps}, playable_steps = {list(self.playable_steps)}"
        return f"{steps}, with the window {self.window}"


def judge(settings: Sequence[Setting]) -> list[Judged]:
    """The settings by LPIPS over the whole horizon, the best first, each with its faults.

    Raises:
        UserError: LPIPS was not measured.
    """
    if not all("lpips" in _sides(one)["model"] for one in settings):
        raise UserError("settings are ranked by LPIPS, which was not measured: its weights miss")
    longest = max(_lasted(one)["mean"] for one in settings)
    ranked = sorted(settings, key=lambda one: _lpips(one)["mean"])
    return [Judged(one, tuple(_faults(one, longest))) for one in ranked]


def answer(judged: Sequence[Judged]) -> Answer | None:
    """What to use; None where no setting is good enough."""
    good = [one.setting for one in judged if not one.faults]
    if not good:
        return None
    equal = [one for one in good if _is_as_good(one, good[0])]
    best = min(equal, key=lambda one: one.steps)
    playable = {one.steps for one in good if one.window == best.window}
    return Answer(best.window, best.steps, tuple(sorted(playable)))


def table(judged: Sequence[Judged]) -> str:
    """One line a setting, then where PSNR or SSIM ranks two of them otherwise than LPIPS."""
    cells = [["", "LPIPS", "minus copy last", "PSNR", "least readable key", "lasts", ""]]
    for one, faults in judged:
        horizon, sides = _horizon(one), _sides(one)
        floor = sides["model_minus"]["copy_last"]["lpips"][horizon]
        key, share = min(_keys(one).items(), key=lambda item: item[1], default=("none", None))
        cells.append(
            [
                one.name,
                comparison.interval(_lpips(one), 3),
                comparison.interval(floor, 3),
                comparison.interval(sides["model"]["psnr"]["mean"][horizon]),
                f"{key} {comparison.number(share)}",
                comparison.interval(_lasted(one), 0),
                "; ".join(faults) or "playable",
            ]
        )
    named = [(one.setting.name, one.setting.results) for one in judged]
    return "\n".join([comparison.aligned(cells), *comparison.pairs_ranked_otherwise(named)])


def writable(path: Path) -> Path:
    """The safetensors file of a model. Raises `UserError` where it is kept in another form."""
    file = path if path.suffix == weights.SUFFIX else path / weights.NAME
    if bundle.is_bundle(path) or not file.is_file():
        raise UserError(
            f"--write changes the header of a safetensors file, and {path} is or has none: export "
            "the model first (python -m cwm_jax.tools.export)"
        )
    return file


def write(file: Path, found: Answer) -> None:
    """Puts the steps into the config that a safetensors file holds; all else stays as it is."""
    params, meta = weights.read(file)
    steps = {"ddim_steps": found.ddim_steps, "playable_steps": list(found.playable_steps)}
    config = meta["config"]
    config |= {"sampler": config.get("sampler", {}) | steps}
    weights.write(file, params, meta | {"config": config})


def _faults(one: Setting, longest: float):
    floor = _sides(one)["model_minus"]["copy_last"]["lpips"][_horizon(one)]
    if not floor["high"] < 0:
        yield "no better than copying the last frame"
    for key, share in _keys(one).items():
        if share < READABLE:
            yield f"{key} is not readable"
    if _lasted(one)["high"] < LASTING * longest:
        yield "does not last"


def _is_as_good(one: Setting, best: Setting) -> bool:
    """Whether the interval of the difference from the best one holds 0."""
    clips = (_sides(x)["by_clip"] for x in (one, best))
    difference = paired.difference(*clips)["lpips"][_horizon(one)]
    return difference["low"] <= 0


def _sides(one: Setting) -> Mapping:
    return next(iter(one.results["rollout"].values()))


def _horizon(one: Setting) -> str:
    return comparison.shown(_sides(one)["model"]["psnr"]["mean"])[-1]


def _lpips(one: Setting) -> Mapping[str, float]:
    return _sides(one)["model"]["lpips"]["mean"][_horizon(one)]


def _keys(one: Setting) -> dict[str, float]:
    """For each key, how readable it is beside real frames; without those that cannot be said."""
    shares = one.results["probe"]["keys_of_real"].items()
    return {key: share for key, share in shares if not math.isnan(share)}


def _lasted(one: Setting) -> Mapping[str, float]:
    """Frames to collapse: the median over clips as `mean`, with its interval."""
    return one.results["drift"]["frames_to_collapse"]
