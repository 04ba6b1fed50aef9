"""Trains a world model.

    python train.py --config configs/small.py --workdir runs/small [--config.lr=3e-4 …]

Started again with the same workdir, it continues from the last checkpoint.
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cwm_jax import loop
from cwm_jax.errors import shown_to_user
from cwm_jax.settings import Settings

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, films and metrics go.")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    with shown_to_user():
        config = _CONFIG.value.to_dict()
        loop.train(Settings.from_config(config), Path(_WORKDIR.value), config=config)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
