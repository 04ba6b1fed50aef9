"""Opens whatever holds a model to draw with: a run, an export of one, or a bundle."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from cwm_jax import checkpoint, model, weights
from cwm_jax.bundle import Bundle, Drawing, is_bundle
from cwm_jax.errors import UserError
from cwm_jax.model import DiTConfig
from cwm_jax.sampler import Sampler, SamplerConfig


class Opened(NamedTuple):
    """A model ready to draw, and what is known of it."""

    sampler: Sampler | Bundle
    config: dict[str, Any]  # the run's full config
    step: int
    path: Path


def open_sampler(
    path: Path | str, *, step: int | None = None, config: SamplerConfig | None = None
) -> Opened:
    """Opens a model to draw with.

    Args:
        path: a run's workdir, one of its checkpoints, an export (orbax or `.safetensors`), or a
            bundle's folder.
        step: which checkpoint of a run; the newest by default.
        config: how to draw. By default as a bundle was made to, and otherwise `SamplerConfig()`.

    Raises:
        UserError: there is no model at `path`, or a bundle draws in another way than `config`.
    """
    path = Path(path)
    if is_bundle(path):
        bundle = Bundle(path)
        _check_drawing(path, bundle.config, config)
        return Opened(bundle, bundle.manifest["config"], bundle.manifest["step"], path)
    if path.suffix == weights.SUFFIX:
        params, meta = weights.read(path)
        network = DiTConfig(**meta["config"]["model"])
        model.check_params(network, params)
        params = jax.tree.map(lambda x: x.astype("float32"), params)
        trained = checkpoint.Trained(network, params, meta["config"], meta["step"], path)
    else:
        trained = checkpoint.load(path, step=step)
    sampler = Sampler(trained.network, trained.params, config or SamplerConfig())
    return Opened(sampler, trained.config, trained.step, trained.path)


def _check_drawing(path: Path, fixed: Drawing, wanted: SamplerConfig | None) -> None:
    for name, value in fixed._asdict().items() if wanted else ():
        if getattr(wanted, name) != value:
            raise UserError(
                f"the bundle {path} draws with {name}={value}, not {getattr(wanted, name)}; "
                "export another, or open the run itself"
            )
