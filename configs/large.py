"""The original's larger network: 119,739,712 parameters.

    python train.py --config configs/large.py --workdir runs/large

For 80 GB GPUs at 128 clips per device, like `small`; twice its arithmetic.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 640
    config.model.depth = 8
    config.model.num_heads = 8
    config.compute.remat = "gelu_norm"
    config.compute.accumulate_steps = 2  # 128 clips at once would want 100 GB even so
    return config
