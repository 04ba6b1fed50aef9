"""Opens models: a run, an export of one, or a bundle."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cwm_jax import config_group
from cwm_jax.checkpoints import bundle, hub_models, run_checkpoint, weights
from cwm_jax.checkpoints.bundle import Bundle, Generation, is_bundle
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.diffusion.schedule import NUM_LEVELS
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.sampling.generator import Generator
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels

_FREE = (
    "dtype",
    "attention",
    "time_attention",
    "norm",
    "mlp",
    "max_frames",
    "warp_sharpness",
    "still_threshold",
)  # parameters fit any of these


class Opened(NamedTuple):
    """A model ready to generate, and its metadata."""

    sampler: Generator
    network: DiTConfig
    params: Params  # float32
    config: dict[str, Any]  # the run's full config
    step: int
    path: Path


def open_sampler(path: Path | str, *, step: int | None = None, **settings: Any) -> Opened:
    """Opens a model to generate with.

    Args:
        path: a run's workdir, one of its checkpoints, an export (orbax or `.safetensors`), or a
            bundle's folder; a folder with a `model.safetensors`; or hf://USER/REPOSITORY.
        step: which checkpoint of a run; the newest by default.
        settings: fields of `SamplerConfig`. Defaults: a bundle's own settings; of other models
            their config's `sampler.ddim_steps`.

    Raises:
        UserError: there is no model at `path`, or a bundle has other settings.
    """
    path = hub_models.here(path)
    if is_bundle(path):
        opened = Bundle(path)
        _check_settings(path, opened.config, settings)
        return Opened(opened, *_from_file(path / bundle.PARAMS)._replace(path=path))
    trained = load(path, step=step)
    config = SamplerConfig(**{"levels": ddim_levels(usual_steps(trained))} | settings)
    return Opened(Sampler(trained.network, trained.params, config), *trained)


def load(path: Path | str, *, step: int | None = None) -> Trained:
    """The network and its parameters in float32, of any model that `open_sampler` opens.

    Kernels for GPUs are replaced by XLA's, which run on every device.

    Raises:
        UserError: there is no model at `path`, or it is damaged.
    """
    trained = _load(hub_models.here(path), step)
    network = trained.network
    anywhere = {name: "auto" for name in ("norm", "mlp") if getattr(network, name) == "triton"}
    if not {*network.attentions} <= {"auto", "xla"}:
        anywhere |= {"attention": "auto", "time_attention": "same"}
    return trained._replace(network=dataclasses.replace(network, **anywhere))


def _load(path: Path, step: int | None) -> Trained:
    if is_bundle(path):
        bundle.read_manifest(path)  # checks its checksums
        return _from_file(path / bundle.PARAMS)
    if (path / weights.NAME).is_file() and not (path / run_checkpoint.FOLDER).is_dir():
        path = path / weights.NAME
    if path.suffix != weights.SUFFIX:
        return run_checkpoint.load(path, step=step)
    trained = _from_file(path)
    if step not in (None, trained.step):
        raise UserError(f"{path} holds step {trained.step} of a run, not step {step}")
    return trained


def same_network(given: DiTConfig, wanted: DiTConfig) -> str | None:
    """The first difference of two networks whose parameters differ: "depth=2, not 1"; or None."""
    for field in dataclasses.fields(wanted):
        have, want = (getattr(network, field.name) for network in (given, wanted))
        if have != want and field.name not in _FREE:
            return f"{field.name}={have!r}, not {want!r}"
    return None


def usual_steps(trained: Trained) -> int:
    """The DDIM steps of a model's own config; `SamplerConfig`'s where it has none.

    Raises:
        UserError: the config's number is not valid.
    """
    steps = trained.config.get("sampler", {}).get("ddim_steps", len(SamplerConfig.levels))
    try:
        ddim_levels(steps)
    except UserError as error:
        raise UserError(f"{trained.path}: its config.sampler.{error}") from None
    return steps


def playable_steps(trained: Trained) -> tuple[int, ...] | None:
    """The numbers of denoising steps that the model's card lists as playable, rising.

    The card is the field `sampler.playable_steps` of the config; None where a model has no card.

    Raises:
        UserError: the field is not a list of whole numbers 1…1000.
    """
    kept = trained.config.get("sampler", {})
    if "playable_steps" not in kept:
        return None
    found = kept["playable_steps"]
    try:
        return check_playable_steps(found)
    except UserError as error:
        raise UserError(f"{trained.path}: its config.sampler.playable_steps {error}") from None


def check_playable_steps(found: Any) -> tuple[int, ...]:
    """The numbers of steps of a card, sorted, each once; raises `UserError` where it is not one."""
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= NUM_LEVELS
    if not (isinstance(found, list | tuple) and found and all(map(whole, found))):
        raise UserError(
            f"is {repr(found)[:80]}; it must be a list of whole numbers 1…{NUM_LEVELS}, "
            "such as [1, 2, 4]"
        )
    return tuple(sorted(set(found)))


def _from_file(path: Path) -> Trained:
    params, meta = weights.read(path)
    try:
        network = config_group.build(DiTConfig, meta["config"]["model"])
    except UserError as error:
        raise UserError(f"{path} is of an unknown network: {error}") from None
    dit.check_params(network, params)
    params = jax.tree.map(lambda x: x.astype("float32"), params)
    return Trained(network, params, meta["config"], meta["step"], path)


def _check_settings(path: Path, fixed: Generation, wanted: dict[str, Any]) -> None:
    for name, value in fixed._asdict().items():
        if wanted.get(name, value) != value:
            raise UserError(
                f"the bundle {path} generates with {name}={value}, not {wanted[name]}; "
                "export another, or open the run itself"
            )
