"""Every setting with its default, the PyTorch original's where it has one.

`docs/settings.md` lists them with their meanings; they are declared beside the code that reads
them and put together in `cwm_jax/experiment/settings.py`. The other configs state only what they
change. Any can be set on the command line:
`python train.py --config configs/small.py --config.optimizer.lr=3e-4`.
"""

from ml_collections import ConfigDict

from cwm_jax.experiment.settings import Settings


def get_config() -> ConfigDict:
    return ConfigDict(Settings().to_config())
