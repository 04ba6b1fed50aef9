"""`evaluate.py`: measures, compares, ranks settings, plays beside the game.

Each job is a module with its flags (`parser`) and its story (`run`).
"""

import sys

from cwm_jax.errors import shown_to_user
from cwm_jax.programs.evaluate import (
    close_loop,
    compare,
    measure,
    measure_outcomes,
    rank_settings,
)
from cwm_jax.programs.evaluate.measure import parser

_JOBS = {
    "compare": compare,
    "settings": rank_settings,
    "closed-loop": close_loop,
    "outcomes": measure_outcomes,
}
SUBCOMMANDS = {name: job.parser for name, job in _JOBS.items()}

__all__ = ["SUBCOMMANDS", "main", "parser"]


def main() -> None:
    with shown_to_user():
        job = _JOBS.get("".join(sys.argv[1:2]))
        if job is None:
            measure.run(sys.argv[1:])
        else:
            job.run(sys.argv[2:])
