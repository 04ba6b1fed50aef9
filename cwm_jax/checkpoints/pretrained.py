"""Which model is meant: one named by its place or on the hub, or else the project's own."""

import sys
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.checkpoints import hub_models
from cwm_jax.errors import UserError, echo
from cwm_jax.files import MODEL_FILE

FOLDER = shipped.model()
NAME = shipped.MODEL


def unless(named: Path | str | None) -> Path:
    """The model that the user named, or else the project's own; which is logged.

    Args:
        named: a path, or `hf://USER/REPOSITORY[@REVISION][/FOLDER]`, which is fetched.

    Raises:
        UserError: there is nothing at the place named, or the project's own is not here.
    """
    if named is not None:
        return located(named)
    if not (FOLDER / MODEL_FILE).is_file():
        raise UserError(_missing())
    notice = f"Using {NAME}, the model that comes with the project; --checkpoint names another"
    echo(notice, file=sys.stdout)
    return FOLDER


def located(named: Path | str) -> Path:
    """Where a model lies on this machine, once it is there.

    Raises:
        UserError: there is nothing of that name, here or on the hub.
    """
    path = hub_models.here(named)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {named}")
    return path


def shown(path: Path) -> str:
    """How a report names a model, without a place of this machine where it has another name."""
    return NAME if path == FOLDER else hub_models.shown(path)


def _missing() -> str:
    why = shipped.missing(f"{NAME}/{MODEL_FILE}") or f"there is none at {FOLDER / MODEL_FILE}"
    return (
        f"no --checkpoint is named, and {why}. Train one in minutes with\n"
        f"    cwm train --config debug --workdir runs/debug\n"
        f"and name it with --checkpoint runs/debug; cwm play --demo shows the page without any"
    )
