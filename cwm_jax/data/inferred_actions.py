"""Data whose actions nobody logged: how `metadata.json` says so, and with what accuracy."""

import os
from pathlib import Path

from cwm_jax import files
from cwm_jax.controls import METADATA

KEY = "inferred_actions"


def note(folder: str | os.PathLike) -> str | None:
    """A sentence for people where a data folder's actions were inferred; None where not."""
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
            f"{_percent(recorded['balanced'])}; the commonest named always: "
            f"{_percent(recorded['accuracy_floor'])} and {_percent(recorded['balanced_floor'])}; "
            f"{on['actions']} actions of {on['clips']} clips)"
        )
    except (KeyError, TypeError, ValueError):
        return "actions: inferred from frames, not recorded; their accuracy is not noted"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
