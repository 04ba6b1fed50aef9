"""Whether batches have room on their way from reading processes to the trainer."""

import shutil
from pathlib import Path

from cwm_jax.errors import echo

_FOLDER = Path("/dev/shm")
_BATCHES_PER_PROCESS = 4  # as seen: Grain keeps so many waiting for each
_BATCHES_TAKEN = 4  # in use, or on their way to the device


def warn_if_short(processes: int, batch_bytes: int, folder: Path = _FOLDER) -> None:
    """Says so on stderr where `folder` has less room than `processes` readers will want.

    When it runs out, readers are killed with no word of the cause.
    """
    if not folder.is_dir():
        return
    wanted = (processes * _BATCHES_PER_PROCESS + _BATCHES_TAKEN) * batch_bytes
    free = shutil.disk_usage(folder).free
    if free < wanted:
        size = f"{-(-wanted // 10**9)}G"
        echo(
            f"warning: {processes} reading processes hand over batches through {folder} and will "
            f"want about {wanted / 1e9:.2g} GB there; {free / 1e9:.2g} GB is free. When it runs "
            f"out, they die. Give it room (mount -o remount,size={size} {folder}, or docker run "
            f"--shm-size={size.lower()}), or set data.num_workers=0 to read in threads."
        )
