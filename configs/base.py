"""Every setting, with the defaults of the PyTorch original where it has them.

The other configs state only what they change. Any key can be set on the command line:
`python train.py --config configs/small.py --config.lr=3e-4 --config.data.dir=data/coinrun`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data, and all noise
    config.distil_from = ""  # a model whose drawing in 2 · ddim_steps steps is learned; empty: none
    config.init_from = ""  # a run or an export whose parameters a new run begins with; empty: none

    # The network (57.8M parameters as it stands; see docs for the other sizes).
    config.model = ConfigDict()
    config.model.hidden_size = 512
    config.model.depth = 6  # blocks, each a spatial and a temporal half
    config.model.num_heads = 8
    config.model.patch_size = 8  # pixels on a side; 64 tokens a frame
    config.model.image_size = 64  # pixels on a side
    config.model.num_actions = 15  # actions, or buttons
    config.model.action_encoding = "one_hot"  # or buttons: any of them held together
    config.model.max_frames = 32  # window of the temporal attention
    config.model.dtype = "auto"  # of the matmuls: float32, bfloat16, or auto (bfloat16 on a GPU)
    config.model.attention = (
        "auto"  # over clips: xla; fused, cudnn (bfloat16 on NVIDIA); auto: measured
    )
    config.model.norm = "auto"  # update and norm: xla; triton (one kernel, NVIDIA); auto: measured
    config.model.history = 0  # earlier frames shown beside each, whose change is drawn; 0: none
    config.model.change_scale = 0.2  # with history: the unit of a change (CoinRun's deviation)
    config.model.motion = 0  # with history: pixels by which the last frame's may move, ≤ patch_size
    config.model.displacement_down = 0  # with history: largest discrete displacement, rows …
    config.model.displacement_across = 0  # … and columns; both 0: none
    config.model.displacement_patch = 4  # pixels on a side that are displaced as one
    config.model.qk_norm = False  # queries and keys scaled to unit RMS
    config.model.heads = False  # reward and end of the episode are predicted too (docs/outcomes.md)

    # Data: `dir` holds train/, val/ and test/ with *.array_record files.
    config.data = ConfigDict()
    config.data.dir = "data/coinrun"
    config.data.clip_len = 32  # frames
    config.data.stride = 8  # a clip starts at every 8th frame of a record
    config.data.num_workers = 8  # reading processes; 0 reads in threads of this one
    config.data.num_threads = 4  # in each reading process
    # Frames kept in the memory of the one device (12,288 bytes each), from which batches are
    # gathered; they are read in the background. 0: batches are read from the files.
    config.data.on_device = 0
    config.data.on_bad_record = "stop"  # or "skip": take clips of the next good record instead
    config.data.max_bad_records = 100  # with "skip": one more in a split stops the run

    # Optimisation.
    config.batch_size = 128  # clips per device
    config.global_batch_size = 0  # clips per step over all devices; 0: batch_size on each
    config.accumulate_steps = 1  # parts in which a device goes through its clips, one by one
    config.remat = "none"  # computed again to save memory: none, gelu_norm, or layer (most)
    config.fsdp = 1  # devices that share one copy of parameters and optimizer; 1: a copy on each
    config.epochs = 10
    config.max_steps = 0  # stop after so many updates; 0: after `epochs`
    config.minutes = 0.0  # stop after so many minutes, compilation included; 0: no limit
    config.decay_share = 0.45  # with minutes: the last share of them brings lr down to 0
    # (share of the run, {"noise.NAME": value, …}), …: settings of noise that change in its course.
    # The run is config.minutes where they are set, else the updates of max_steps or epochs.
    config.stages = ()
    config.lr = 1e-4
    config.weight_decay = 0.01  # on every parameter
    config.warmup_steps = 2000
    config.decay_steps = 0  # the last so many of max_steps bring lr down to 0
    config.grad_clip = 1.0  # by global norm
    config.ema_decay = 0.0  # moving average of the parameters, sampled from; 0: none
    config.max_skipped_updates = 0  # updates of infinite or no loss passed over; one more: stop

    # Examples made of clips, beyond a random noise label for each frame.
    config.noise = ConfigDict()
    config.noise.top_share = 0.0  # of frames, that get the highest label: a frame's first pass
    config.noise.own_share = 0.0  # of clips, whose context frames the network generates itself …
    config.noise.own_passes = 1  # … all at once, so many times over, each from the ones before
    config.noise.own_steps = 0  # … or frame by frame, in so many denoising steps; 0: all at once
    config.noise.own_top_share = 0.0  # … in this share of them with all levels the highest
    config.noise.own_renoised = False  # … and passes after the first renoise those, not real ones
    config.noise.own_start_noise = 0.0  # … after a first frame with noise of about this size
    config.noise.persist_above = 0.0  # wrong patches of them are learned to stay (docs/pocket.md)
    config.noise.mirror_share = 0.0  # of clips, with left and right exchanged (CoinRun's actions)
    config.noise.middle_weight = 1.0  # of the pixels around the player in the loss
    config.noise.displacement_weight = 0.1  # of the cross-entropy of displacements in the loss
    config.noise.outcome_weight = 0.1  # of the cross-entropies of reward and end in the loss

    # What happens every so many steps; 0 for validation, scores and rollouts: never.
    config.log_every_steps = 50
    config.val_every_steps = 5000  # validation loss on `val_batches` batches
    config.val_batches = 50
    config.eval_every_steps = 1000  # quick rollouts on validation clips, scored (`eval/…`)
    config.eval_clips = 16
    config.eval_frames = 16  # drawn after one given frame
    config.rollout_every_steps = 1000
    config.ckpt_every_steps = 10_000
    config.ckpt_every_minutes = 0.0  # a checkpoint also after so many minutes; 0: only by steps
    config.keep_checkpoints = 3  # the newest so many stay …
    config.keep_every_steps = 0  # … and those of steps that are multiples of this; 0: none
    config.keep_best = 1  # … and so many of lowest val/loss, of those validated at their step

    # Rollouts drawn during training.
    config.ddim_steps = 10
    config.n_prompt = 1  # real frames that a rollout starts from
    config.rollout_frames = 16  # in all, prompt included
    config.n_rollout_samples = 4

    # Weights & Biases. mode: auto (online where a key is configured, else off), online, offline
    # or disabled.
    config.wandb = ConfigDict()
    config.wandb.project = ""  # W&B's own setting, else coinrun-world-model
    config.wandb.entity = ""
    config.wandb.mode = "auto"

    config.logging = ConfigDict()
    config.logging.tensorboard = False  # the same in the workdir, for TensorBoard
    return config
