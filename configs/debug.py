"""A small network on the embedded data: learns something to look at in minutes on two CPU cores.

python train.py --config configs/debug.py --workdir runs/debug
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 128
    config.model.depth = 3
    config.model.num_heads = 4
    config.model.max_frames = 16

    config.data.dir = "assets/coinrun"
    config.data.clip_len = 16
    config.data.num_workers = 0

    config.batch_size = 8
    config.max_steps = 600
    config.lr = 1e-3
    config.warmup_steps = 100
    config.ema_decay = 0.99

    config.log_every_steps = 10
    config.val_every_steps = 100
    config.val_batches = 4
    config.eval_every_steps = 300
    config.eval_clips = 4
    config.eval_frames = 10
    config.rollout_every_steps = 300
    config.ckpt_every_steps = 300
    return config
