"""What the jobs of `evaluate.py` write: checked before they measure, printed if writing fails."""

from collections.abc import Mapping
from pathlib import Path

from cwm_jax.errors import UserError
from cwm_jax.evaluation import full
from cwm_jax.files import check_writable


def check_folder(folder: Path) -> None:
    """Raises `UserError` if no file of a folder can be written."""
    try:
        check_writable(folder / "file")
    except UserError as error:
        raise UserError(
            f"cannot write to the folder {folder}: {error.__cause__.strerror}; name a folder you "
            "may write to"
        ) from None


def write_numbers(path: Path, results: Mapping) -> None:
    """Writes results as JSON; if that fails, prints them first.

    Raises:
        UserError: `path` cannot be written.
    """
    try:
        full.write_json(path, results)
    except (OSError, UserError) as error:
        print(full.as_json(results), flush=True)
        reason = f"cannot write {path}: {error}" if isinstance(error, OSError) else error
        raise UserError(f"{reason}\nthe numbers were printed to stdout instead") from error
