"""`config.data`: where clips come from, how they are read, and how many make a batch."""

import dataclasses

from cwm_jax.config_group import ConfigGroup, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(ConfigGroup):
    """Where clips come from and how they are read; `config.data` of a config file."""

    PATH = "config.data"

    dir: str = setting(
        "data/coinrun", "folder with `train/`, `val/` and `test/` of ArrayRecord files"
    )
    clip_len: int = setting(32, "frames in a training clip", least=1)
    stride: int = setting(8, "a clip starts at every so many frames of a record", least=1)
    batch_size: int = setting(128, "clips per device", least=1)
    global_batch_size: int = setting(
        0, "clips per step over all devices; 0: `batch_size` on each", least=0
    )
    num_workers: int = setting(
        8, "processes that read for training; 0: threads of the training process", least=0
    )
    num_threads: int = setting(4, "in each reading process; each prepares one batch ahead", least=1)
    on_device: int = setting(
        0,
        "frames kept in the memory of the one device (12,288 bytes each), from which batches are "
        "gathered; they are read in the background; 0: batches are read from the files",
        least=0,
    )
    on_bad_record: str = setting(
        "stop", "`skip`: clips of the next good record take its place", choices=("stop", "skip")
    )
    max_bad_records: int = setting(100, "with `skip`: one more in a split stops the run", least=0)
