"""The note in `metadata.json` on actions that were inferred, with their accuracy."""

import os
from pathlib import Path

from cwm_jax import files
from cwm_jax.controls import METADATA

KEY = "inferred_actions"


def note(folder: str | os.PathLike) -> str | None:
    """A sentence about a data folder's inferred actions; None if they were recorded."""
    try:
        recorded = files.read_json_object(Path(folder) / METADATA).get(KEY)
    except FileNotFoundError:
        return None
    if recorded is None:
        return None
    try:
        on = recorded["measured_on"]
        return (
            f"actions: inferred from frames, not recorded; of held-out real ones "
            f"{_percent(recorded['accuracy']['mean'])} are right (balanced over groups "
            f"{_percent(recorded['balanced'])}; always the most common: "
            f"{_percent(recorded['accuracy_floor'])} and {_percent(recorded['balanced_floor'])}; "
            f"{on['actions']} actions of {on['clips']} clips)"
        )
    except (KeyError, TypeError, ValueError):
        return "actions: inferred from frames, not recorded; their accuracy is not recorded"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
