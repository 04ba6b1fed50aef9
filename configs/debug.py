"""A small network on the embedded data: learns something to look at in minutes on two CPU cores.

    python train.py --config configs/debug.py --workdir runs/debug

5.4M parameters. The 400 updates take 350 s of processor time, compilation included, without
validation and rollouts (Intel Xeon, jax 0.10.2). The network generates the residual of a displaced
frame, as `configs/pocket.py` does. Small batches of short clips, because early on many rough
updates teach more than few good ones; in one of two clips the network generates the context.

On the 20 test clips of the embedded data, from 4 given frames in one step, LPIPS at frames 1, 2, 5
and 10 is 0.068, 0.129, 0.268 and 0.332, no better than of the last given frame, repeated (0.061,
0.121, 0.260, 0.318); PSNR is 20.9, 17.9, 13.4 and 11.7 dB (26.7, 24.6, 15.3, 11.2).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.hidden_size = 256  # wide enough to carry the 192 numbers of a patch through
    config.model.depth = 2
    config.model.num_heads = 4
    config.model.max_frames = 16
    config.model.history = 2
    config.model.displacement_down = 8  # copies of whole pixels stay sharp, as in the pocket model
    config.model.displacement_across = 4
    config.model.displacement_patch = 4
    config.model.qk_norm = True

    config.data.dir = "assets/coinrun"
    config.data.clip_len = 8
    config.data.num_workers = 0
    config.data.num_threads = 1

    config.data.batch_size = 2
    config.schedule.max_steps = 400
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 200
    config.optimizer.ema_decay = 0.995
    config.noise_levels.top_share = 0.2
    config.context.share = 0.5
    config.context.steps = 1
    config.context.top_share = 0.5
    config.context.start_noise = 0.05
    config.augment.mirror_share = 0.45
    config.loss.middle_weight = 4.0
    config.loss.displacement_weight = 0.1

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
