"""The full system: 57,821,888 parameters, the original's sizes and settings.

    python train.py --config configs/small.py --workdir runs/small

Made for two 80 GB GPUs (effective batch 256 at 128 clips per device) and the full dataset in
data/coinrun. The original needs 3.4 hours an epoch on two H100.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.compute.remat = "gelu_norm"  # 128 clips would fill an 80 GB card to the brim without
    return config
