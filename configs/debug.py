"""A small network on the embedded data: learns something to look at in minutes on two CPU cores.

    python train.py --config configs/debug.py --workdir runs/debug

5.2M parameters; three to five minutes; the validation loss falls to about 0.34. Small
batches of short clips, because early on many rough updates teach more than few good ones.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 256  # wide enough to carry the 192 numbers of a patch through
    config.model.depth = 2
    config.model.num_heads = 4
    config.model.max_frames = 16
    config.model.history = 2  # generates residuals: minutes do not suffice to learn whole frames

    config.data.dir = "assets/coinrun"
    config.data.clip_len = 8
    config.data.num_workers = 0
    config.data.num_threads = 1

    config.data.batch_size = 2
    config.schedule.max_steps = 800
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 400
    config.optimizer.ema_decay = 0.995
    config.noise_levels.top_share = 0.2

    config.logging.every_steps = 20
    config.validation.every_steps = 200
    config.validation.batches = 25
    config.evaluation.every_steps = 400
    config.evaluation.clips = 4
    config.evaluation.frames = 8
    config.rollouts.every_steps = 400
    config.checkpoints.every_steps = 400

    config.sampler.ddim_steps = (
        1  # so little trained, the network adds its own error with every step
    )
    return config
