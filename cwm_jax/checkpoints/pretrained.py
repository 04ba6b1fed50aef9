"""The model that comes with the repository, used where no other is named."""

import sys
from pathlib import Path

from cwm_jax.errors import UserError, tell

FOLDER = Path(__file__).parents[2] / "checkpoints" / "pocket"
NAME = "checkpoints/pocket"
FILE = "model.safetensors"


def unless(named: Path | None) -> Path:
    """The model that the user named, or else the repository's own; which is said.

    Raises:
        UserError: there is nothing at the place named, or this is no checkout with a model in it.
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
            f"and name it with --checkpoint runs/debug; play.py --demo shows the page without any"
        )
    told = f"Using {NAME}, this repository's own model; --checkpoint names another"
    tell(told, file=sys.stdout)
    return FOLDER
