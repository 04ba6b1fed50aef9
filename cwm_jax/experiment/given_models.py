"""Models that a run begins with: parameters of `init_from`, and the teacher of `distil_from`."""

import dataclasses
import functools
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from cwm_jax.checkpoints import formats
from cwm_jax.errors import UserError, echo
from cwm_jax.experiment.settings import Settings
from cwm_jax.models import dit
from cwm_jax.runtime import sharding
from cwm_jax.training import train_step
from cwm_jax.training.examples import Teacher


def first_params(settings: Settings) -> dict[str, np.ndarray] | None:
    """The parameters that a new run begins with; None where they are random.

    Raises `UserError` where `config.init_from` names none, or those of another network.
    """
    path = settings.init_from
    if not path:
        return None
    echo(f"starting from the parameters of {path}", file=sys.stdout)
    return _params_of(settings, "init_from", path)


def teacher(settings: Settings, mesh: Mesh | None) -> Teacher | None:
    """The model that the run distils; None where there is none.

    Raises `UserError` where `config.distil_from` names none, or that of another network.
    """
    path = settings.distil_from
    if not path:
        return None
    params = _params_of(settings, "distil_from", path)
    echo(f"distilling {path} to half of its denoising steps", file=sys.stdout)
    make = functools.partial(
        train_step.init_teacher, settings.model, steps=settings.sampler.ddim_steps
    )
    shapes = jax.eval_shape(make, params)
    return jax.jit(make, out_shardings=sharding.placement(shapes, mesh))(params)


def _params_of(settings: Settings, name: str, path: str) -> dict[str, np.ndarray]:
    """The parameters of a model that a setting names; it must have this run's network.

    But for heads: they begin anew where it has none.
    """
    network = settings.model
    try:
        given = formats.load(path)
    except UserError as error:
        raise UserError(f"config.{name}: {error}") from None
    same_heads = dataclasses.replace(given.network, heads=network.heads)
    if differs := formats.same_network(same_heads, network):
        raise UserError(f"config.{name}={path} has another network than config.model: {differs}")
    params = dit.with_heads(network, given.params, settings.seed)
    return jax.tree.map(np.asarray, params)
