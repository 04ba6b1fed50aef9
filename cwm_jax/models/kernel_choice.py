"""Chooses the kernels of attention, over space and over time, norms and MLPs that are `auto`.

On an NVIDIA GPU each available kernel computes values and gradients on small arrays, which are
compared with a float32 formula, and is timed forward and backward on the run's own shapes. The
fastest correct one is chosen. Results are kept in `kernels.json` in the folder of compiled
programs. On other devices, and outside training, auto is XLA's.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cwm_jax import files
from cwm_jax.errors import UserError, echo
from cwm_jax.models import attention, kernel_measure, kernel_trials, kernels, layers
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.kernel_measure import Found, is_final, measure, one_line
from cwm_jax.models.kernel_trials import Trial
from cwm_jax.runtime import compile_cache

FILE = "kernels.json"
FALLBACK = "xla"
_ATTENTION = "xla", "fused"
_TRITON = "xla", "triton"
KERNELS = {"attention": _ATTENTION, "time_attention": _ATTENTION, "norm": _TRITON, "mlp": _TRITON}


def settings(network: DiTConfig) -> dict[str, str]:
    """The kernels of a network by setting; without that over time if it is the one over space."""
    over_space, over_time = network.attention_kernels
    apart = {"time_attention": over_time} if over_time != over_space else {}
    others = {"norm": network.norm_kernel, "mlp": network.mlp_kernel}
    return {"attention": over_space, **apart, **others}


def measured(network: DiTConfig, *, clips: int, frames: int) -> DiTConfig:
    """The network with the kernels chosen for auto on this device; all processes must call it.

    A failure never ends the run: a kernel that fails is not chosen.

    Args:
        clips: that a device processes at once.
        frames: of a clip.
    """
    over_space, over_time = network.attentions
    asked = {"attention": over_space, "time_attention": over_time}
    asked |= {"norm": network.norm, "mlp": network.mlp}
    if "auto" not in asked.values() or not attention.fuses():
        return network
    outcomes, chosen, reports = _outcomes(network, clips, frames), {}, []
    for setting, kernel in asked.items():
        chosen[setting] = kernel
        if kernel == "auto":
            found, remark = outcomes.get(setting, ({}, ""))
            chosen[setting] = fastest(_agreed(setting, found))
            reports.append(f"{setting}={chosen[setting]} ({_listed(found)}{remark})")
    if jax.process_index() == 0:
        device = jax.devices()[0].device_kind
        echo(f"kernels on {device}, forward and backward: {'; '.join(reports)}", file=sys.stdout)
    if chosen["time_attention"] == chosen["attention"]:
        chosen["time_attention"] = "same"
    return dataclasses.replace(network, **chosen)


def fastest(found: Found) -> str:
    """The fastest candidate; XLA's where none has a time."""
    times = {name: value for name, value in found.items() if not isinstance(value, str)}
    return min(times, key=times.get, default=FALLBACK)


def _outcomes(network: DiTConfig, clips: int, frames: int) -> dict[str, tuple[Found, str]]:
    """Results for each setting that is auto, and a remark; none for a setting that failed."""
    outcomes: dict[str, tuple[Found, str]] = {}
    try:
        key, kept = _key(network, clips, frames), _read()
        for trial in kernel_trials.trials(network, clips=clips, frames=frames):
            found = kept.get(key, {}).get(trial.setting)
            if _is_result_of(found, trial):
                outcomes[trial.setting] = found, ", measured before"
                continue
            found = measure(trial)
            outcomes[trial.setting] = found, ""
            if all(map(is_final, found.values())):
                _keep(key, trial.setting, found)
    except Exception as error:  # optional: the run continues with XLA's kernels
        echo(f"warning: kernels could not be measured: {one_line(error)}")
    return outcomes


def _agreed(setting: str, found: Found) -> Found:
    """For each candidate that is correct in all processes, its longest time."""
    if jax.process_count() == 1:
        return found
    names = KERNELS[setting]
    # A process without measurements excludes all but XLA's.
    times = [found.get(name, 1e9 if name == FALLBACK else math.inf) for name in names]
    mine = np.array([math.inf if isinstance(x, str) else x for x in times], np.float32)
    longest = multihost_utils.process_allgather(mine).max(0)
    return {n: float(x) for n, x in zip(names, longest, strict=True) if math.isfinite(x)}


def _key(network: DiTConfig, clips: int, frames: int) -> str:
    """Everything that the results depend on."""
    device = jax.devices()[0]
    return json.dumps(
        {
            "device": device.device_kind,
            "platform": device.client.platform_version,
            "jax": jax.__version__,
            "code": _code_version(),
            "dtype": network.compute_dtype.name,
            "clips": clips,
            "frames": frames,
            "tokens": network.tokens,
            "hidden_size": network.hidden_size,
            "num_heads": network.num_heads,
        }
    )


def _code_version() -> str:
    """A hash of the code of the kernels and of their measurement."""
    folder = Path(kernels.__file__).parent
    modules = [attention, kernel_measure, kernel_trials, layers]
    sources = [*sorted(folder.glob("*.py")), *(Path(module.__file__) for module in modules)]
    text = b"".join(path.read_bytes() for path in [*sources, Path(__file__)])
    return hashlib.sha256(text).hexdigest()[:16]


def _path() -> Path | None:
    folder = compile_cache.folder()
    return folder and folder / FILE


def _read() -> dict[str, dict[str, Found]]:
    """All stored results, by key and setting; none where the file is damaged."""
    path = _path()
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        if not all(isinstance(value, dict) for value in (kept, *kept.values())):
            raise ValueError("it does not hold measurements")
    except (OSError, ValueError, AttributeError) as error:
        echo(f"warning: {path} cannot be used and is ignored: {one_line(error)}")
        return {}
    return kept


def _keep(key: str, setting: str, found: Found) -> None:
    path = _path()
    if path is None:
        return
    kept = _read()
    kept[key] = kept.get(key, {}) | {setting: found}
    try:
        with files.written_whole(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    except (OSError, UserError) as error:
        echo(f"warning: measurements of kernels could not be saved: {one_line(error)}")


def _is_result_of(found: object, trial: Trial) -> bool:
    """Whether these are results of the trial."""
    if not isinstance(found, Mapping) or set(found) != set(trial.candidates):
        return False
    return all(isinstance(value, (int, float, str)) for value in found.values())


def _listed(found: Found) -> str:
    if len(found) <= 1:
        return "no other fits" if found else "not measured"
    shown = lambda value: value if isinstance(value, str) else f"{value:.3g} ms"
    return ", ".join(f"{name} {shown(value)}" for name, value in found.items())
