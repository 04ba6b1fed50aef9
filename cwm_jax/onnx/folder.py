"""An ONNX export: a folder of graphs, their shared weights, and a description.

    model.json        sizes, noise levels, the files' checksums; also in the graphs' metadata
    weights.bin       all parameters
    denoise.onnx      one denoising step of one or several frames
    frame-S.onnx      a whole frame of S denoising steps
    encode.onnx       keys and values of clean frames: of a prompt, of half a window, of one frame

`cwm_jax.onnx.runtime` shows how they are used together.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cwm_jax import __version__, files
from cwm_jax.checkpoints import formats
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.diffusion import denoiser, displacement, stillness, warp
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.errors import UserError
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import SamplerConfig, ddim_levels

DESCRIPTION = "model.json"
WEIGHTS = "weights.bin"
FORMAT = 1
DTYPES = ("float32", "float16")


def default_steps(trained: Trained) -> tuple[int, ...]:
    """The numbers of denoising steps of the model's card; without one, its config's."""
    return formats.playable_steps(trained) or (formats.usual_steps(trained),)


def write(trained: Trained, out: Path, *, steps: Sequence[int], dtype: str) -> dict[str, Any]:
    """Writes the graphs, and returns the description.

    Args:
        out: an existing folder.
        steps: the numbers S of denoising steps that a frame may be generated with.
        dtype: float32 or float16, of the stored weights; all computation is in float32.

    Raises:
        UserError: the libraries for ONNX are not installed.
    """
    _check_library()
    from cwm_jax.onnx import generator
    from cwm_jax.onnx.nodes import Weights

    network = dataclasses.replace(trained.network, dtype="float32", attention="xla", norm="xla")
    plan = generator.Plan(tuple(sorted(set(steps))), SamplerConfig.context_level)
    weights = Weights(WEIGHTS, dtype)
    tables = _tables(network, trained.params, plan)
    generator.store(weights, network, _arrays(trained.params), tables)
    about = _about(trained, network, plan, dtype)
    graphs = generator.Graphs(network, weights, plan, {"cwm_jax": json.dumps(about)})
    models = [graphs.denoise(), graphs.encode(), *map(graphs.frame, plan.steps)]
    (out / WEIGHTS).write_bytes(weights.data)
    for model in models:
        (out / f"{model.graph.name}.onnx").write_bytes(model.SerializeToString())
    found = {path.name: files.sha256(path) for path in sorted(out.iterdir())}
    about["weights"] = weights.places
    about["files"] = {name: digest for name, digest in found.items() if name != DESCRIPTION}
    (out / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def _check_library() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserError(
            "an ONNX export needs the package onnx: pip install 'cwm_jax[onnx]'"
        ) from None


def _arrays(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in params.items()}


def _tables(network, params, plan) -> sampler.Tables:
    config = SamplerConfig(levels=plan.levels[:-1], context_level=plan.context_level)
    tables = jax.jit(lambda params: sampler.tabulate(bind(network, params), config))(params)
    return jax.tree.map(np.asarray, tables)


def _about(trained: Trained, network, plan, dtype: str) -> dict[str, Any]:
    from cwm_jax.onnx.nodes import IR_VERSION, OPSET

    sizes = dataclasses.asdict(network)
    names = ("image_size", "patch_size", "hidden_size", "depth", "num_heads", "max_frames")
    names += ("num_actions", "action_encoding", "history", "residual_scale", "warp_reach")
    names += ("qk_norm", "prediction")
    return {
        "format": FORMAT,
        "made_with": _versions(),
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "step": trained.step,
        "stored_in": dtype,
        "network": {name: sizes[name] for name in names}
        | {"action_values": network.action_values, "tokens": network.tokens}
        | {"displacement": _displacement(network), "still": _still(network)},
        "steps": list(plan.steps),
        "usual_steps": formats.usual_steps(trained),
        "levels": {str(n): list(ddim_levels(n)) for n in plan.steps},
        "table": plan.table,
        "log_variances": list(warp.LOG_VARIANCES),
        "first_rows": {str(n): plan.first_row(n) for n in plan.steps},
        "context_level": plan.context_level,
        "noise_clip": sampler.NOISE_CLIP,
    }


def _displacement(network) -> dict[str, Any] | None:
    """How far patches may be displaced, and what is subtracted from each displacement's logit."""
    reach = network.reach
    if not reach:
        return None
    cost = denoiser.STAY * displacement.distances(reach)
    return reach._asdict() | {"cost": [float(np.float32(x)) for x in cost]}


def _still(network) -> dict[str, Any] | None:
    """When patches of a frame stay as they were, see `cwm_jax.diffusion.stillness`."""
    if not network.still_threshold:
        return None
    sizes = {"patch": stillness.PATCH, "share": stillness.SHARE}
    return sizes | {"threshold": network.still_threshold}


def _versions() -> dict[str, str]:
    import onnx

    return {"cwm_jax": __version__, "jax": jax.__version__, "onnx": onnx.__version__}


def read(folder: Path) -> dict[str, Any]:
    """The description, after every file was checked against it.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    path = folder / DESCRIPTION
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} describes no ONNX export: {error}") from None
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT or not isinstance(about.get("files"), dict):
        raise UserError(f"{path} has format {found!r}; this reads {FORMAT}")
    for name, wanted in about["files"].items():
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; copy the whole folder")
        if files.sha256(folder / name) != wanted:
            raise UserError(
                f"{folder / name} is damaged: its checksum is not that of {DESCRIPTION}"
            )
    return about
