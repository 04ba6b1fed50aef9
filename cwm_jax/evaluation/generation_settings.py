"""Which numbers of denoising steps, which window and how sharp a warp a model should be used with.

A setting is good enough to play with if its LPIPS is certainly below that of copying the last given
frame, each key can be read off its frames, and its rollouts do not certainly collapse early. The
best one is that of least LPIPS among those; where the difference from a cheaper one is not certain,
the cheaper one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cwm_jax import shipped
from cwm_jax.checkpoints import bundle, hub_models, weights
from cwm_jax.errors import UserError, echo
from cwm_jax.evaluation import comparison, paired
from cwm_jax.models.config import DiTConfig

READABLE = 0.5  # of what real frames show of a key
SHARPER = 4.0  # the power of softmax filters that is tried beside 1
LASTING = 0.5  # of the frames to collapse of the setting that lasts longest


class Setting(NamedTuple):
    """A way of generating frames, and what was measured of it."""

    steps: int  # denoising steps a frame
    window: str
    results: Mapping  # as in metrics.json, with LPIPS
    sharpness: float = 1.0  # power of the warp's softmax filters

    @property
    def name(self) -> str:
        sharp = "" if self.sharpness == 1 else f", filters to the power {self.sharpness:g}"
        return f"S = {self.steps}, {self.window}{sharp}"


class Judged(NamedTuple):
    """A setting and what keeps it from being good enough to play with (nothing: empty)."""

    setting: Setting
    faults: tuple[str, ...]


class Answer(NamedTuple):
    """What a model's config should say."""

    window: str
    ddim_steps: int
    playable_steps: tuple[int, ...]  # rising, with this window and sharpness
    sharpness: float = 1.0

    def __str__(self) -> str:
        found = f"ddim_steps = {self.ddim_steps}, playable_steps = {list(self.playable_steps)}"
        if self.sharpness != 1:
            found += f", model.warp_sharpness = {self.sharpness:g}"
        return f"{found}, with the window {self.window}"


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
    alike = lambda one: (one.window, one.sharpness) == (best.window, best.sharpness)
    playable = {one.steps for one in good if alike(one)}
    return Answer(best.window, best.steps, tuple(sorted(playable)), best.sharpness)


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


def sharpnesses(network: DiTConfig, wanted: Sequence[float] | None) -> tuple[float, ...]:
    """Which powers of softmax filters to try; where the network has none, says so, and 1 alone.

    Args:
        wanted: None: the model as it is, and `SHARPER`.

    Raises:
        UserError: powers that cannot be.
    """
    if not network.warp_reach:
        kind = "copies whole pixels" if network.reach else "does not warp the last frame"
        echo(
            f"warp sharpness is left out: it is the power of softmax filters, and this network "
            f"{kind}"
        )
        return (1.0,)
    tried = wanted or sorted({1.0, network.warp_sharpness, SHARPER})
    for power in tried:
        dataclasses.replace(network, warp_sharpness=power)  # raises where it cannot be
    return tuple(tried)


def writable(path: Path) -> Path:
    """The safetensors file of a model. Raises `UserError` where it is kept in another form."""
    file = path if path.suffix == weights.SUFFIX else path / weights.NAME
    if bundle.is_bundle(path) or not file.is_file():
        raise UserError(
            f"--write changes the header of a safetensors file, and {path} is or has none: export "
            "the model first (python -m cwm_jax.tools.export)"
        )
    if not shipped.is_checkout() and file.is_relative_to(shipped.root()):
        raise UserError(f"--write would change the installed package: copy {file} first")
    if hub_models.shown(file) != str(file):
        raise UserError(f"--write would change a kept copy of {hub_models.shown(file)}: fetch it")
    return file


def write(file: Path, found: Answer) -> None:
    """Puts the answer into the config that a safetensors file holds; all else stays as it is."""
    params, meta = weights.read(file)
    steps = {"ddim_steps": found.ddim_steps, "playable_steps": list(found.playable_steps)}
    config = meta["config"]
    config |= {"sampler": config.get("sampler", {}) | steps}
    if found.sharpness != config["model"].get("warp_sharpness", 1.0):
        config |= {"model": config["model"] | {"warp_sharpness": found.sharpness}}
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
