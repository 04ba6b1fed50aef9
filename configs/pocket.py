"""The pocket world: a network of 10.2M parameters, for play on two laptop cores.

    make pocket MINUTES=9 FRAMES=4000000      # on a GPU
    make pocket MINUTES=300                   # on two CPU cores

records the game, trains by the clock and exports the moving average. The network generates the
residual from the last frame, of which each patch of 4 pixels is displaced as a whole, and is shown
the last four frames. `docs/pocket.md` says why. As it stands the config is for a CPU; on a GPU
`make pocket` sets 128 clips an update and keeps the data in the GPU's memory: 5,814 updates in 8.95
minutes of one H100.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 256
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.max_frames = 12
    config.model.history = 4
    config.model.displacement_down = 8
    config.model.displacement_across = 4
    config.model.displacement_patch = 4
    config.model.qk_norm = True
    config.model.still_threshold = 1.0

    config.data.dir = "data/pocket"
    config.data.clip_len = 12
    config.data.stride = 1
    config.data.num_workers = 0
    config.data.num_threads = 1

    config.data.batch_size = 4
    config.schedule.epochs = 1_000_000  # the minutes end first
    config.schedule.minutes = 300.0
    config.schedule.decay_share = 0.45
    config.optimizer.lr = 1.2e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.999
    config.noise_levels.top_share = 0.35
    config.context.share = 0.5
    config.context.steps = 2
    config.context.top_share = 0.5
    config.context.start_noise = 0.08
    config.context.persist_above = 0.15
    config.augment.mirror_share = 0.45
    config.loss.middle_weight = 4.0
    config.loss.displacement_weight = 0.1

    config.logging.every_steps = 50
    config.validation.every_steps = 1000
    config.validation.batches = 40
    config.evaluation.every_steps = 2000
    config.evaluation.clips = 8
    config.evaluation.frames = 10
    config.rollouts.every_steps = 2000
    config.checkpoints.every_steps = 1_000_000_000  # by the minutes alone
    config.checkpoints.every_minutes = 2.0
    config.checkpoints.keep = 2

    config.sampler.ddim_steps = 2
    return config
