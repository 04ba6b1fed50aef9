"""The pocket world: the network in `checkpoints/pocket`, for play on two laptop cores.

    make pocket

records the game, trains for five to seven hours on two CPU cores, distils what it trained to four
steps, and exports it. 5.2M parameters. It draws the change from the last frame, and is shown the
last two: `docs/pocket.md` says why, what was compared, how long it took and how good it is.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 256
    config.model.depth = 2
    config.model.num_heads = 4
    config.model.max_frames = 12
    config.model.history = 2
    config.model.motion = 8

    config.data.dir = "data/pocket"
    config.data.clip_len = 12
    config.data.num_workers = 0
    config.data.num_threads = 1

    config.batch_size = 4
    config.global_batch_size = 4
    config.max_steps = 17_550
    config.lr = 1.5e-3
    config.warmup_steps = 100
    config.decay_steps = 1400
    config.ema_decay = 0.999
    config.noise.top_share = 0.2
    config.noise.own_share = 0.5  # 0 in the first 2000 updates, as there is little to mend yet
    config.noise.own_passes = 3  # 1 until update 16,150
    config.noise.own_top_share = 0.5
    config.noise.mirror_share = 0.4
    config.noise.middle_weight = 6.0

    config.log_every_steps = 50
    config.val_every_steps = 1000
    config.val_batches = 40
    config.eval_every_steps = 2000
    config.eval_clips = 8
    config.eval_frames = 10
    config.rollout_every_steps = 2000
    config.ckpt_every_steps = 500
    config.keep_checkpoints = 4

    config.ddim_steps = 4
    return config
