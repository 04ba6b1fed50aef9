"""The repository's own model, the default of the programs."""

import sys
from pathlib import Path

from cwm_jax.errors import UserError, tell

FOLDER = Path(__file__).parents[2] / "checkpoints" / "pocket"
NAME = "checkpoints/pocket"
FILE = "model.safetensors"


def unless(named: Path | None) -> Path:
    """The model that the user named, or else the repository's own, which is printed.

    Raises:
        UserError: there is nothing at the named path, or this is not a checkout with the model.
    """
    if named is not None:
        if not named.exists():
            raise UserError(f"there is no checkpoint at {named}")
        return named
    if not (FOLDER / FILE).is_file():
        raise UserError(
            f"no --checkpoint is named, and the repository's own is not at {FOLDER / FILE}. "
            f"Train one in minutes with\n"
            f"    python train.py --config configs/debug.py --workdir runs/debug\n"
            f"and name it with --checkpoint runs/debug; play.py --demo needs no model"
        )
    message = f"Using {NAME}, this repository's own model; --checkpoint names another"
    tell(message, file=sys.stdout)
    return FOLDER
