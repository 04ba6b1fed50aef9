"""Trains a world model.

    python train.py --config configs/small.py --workdir runs/small [--config.lr=3e-4 …]

Started again with the same workdir, it continues from the last checkpoint. SIGTERM or Ctrl-C make
it finish its step, save, and exit with code 75; a second one ends it at once.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cwm_jax import loop, stopping
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.settings import Settings

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, films and metrics go.")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    with shown_to_user():
        config = _CONFIG.value.to_dict()
        settings = Settings.from_config(config)
        try:
            loop.train(settings, Path(_WORKDIR.value), config=config)
        except stopping.Preempted as stopped:
            print(stopped, file=sys.stderr)
            raise SystemExit(stopping.EXIT_CODE) from None


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; ml_collections' own errors become ones that a person can read."""
    with shown_to_user():
        try:
            rest = app.parse_flags_with_usage(argv)
            _CONFIG.value.to_dict()  # a file that did not load says so only now
        except (AttributeError, KeyError, TypeError, OSError, ImportError, SyntaxError) as error:
            given = [word for word in argv if word.startswith("--config.")]
            words = " ".join(str(error.args[0]).split())
            raise UserError(f"the config or {given or '--config'} is wrong: {words}") from None
    return rest


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse)
