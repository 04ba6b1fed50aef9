"""Checks the shared memory for batches between reading processes and the trainer."""

import shutil
from pathlib import Path

from cwm_jax.errors import echo

_FOLDER = Path("/dev/shm")
_BATCHES_PER_PROCESS = 4  # measured: Grain keeps so many ready for each
_BATCHES_TAKEN = 4  # in use, or being copied to the device


def warn_if_short(processes: int, batch_bytes: int, folder: Path = _FOLDER) -> None:
    """Warns on stderr if `folder` has less space than `processes` readers need.

    When it runs out, readers are killed without a message.
    """
    if not folder.is_dir():
        return
    wanted = (processes * _BATCHES_PER_PROCESS + _BATCHES_TAKEN) * batch_bytes
    free = shutil.disk_usage(folder).free
    if free < wanted:
        size = f"{-(-wanted // 10**9)}G"
        echo(
            f"warning: {processes} reading processes pass batches through {folder} and will "
            f"need about {wanted / 1e9:.2g} GB there; {free / 1e9:.2g} GB is free. When it runs "
            f"out, they exit. Enlarge it (mount -o remount,size={size} {folder}, or docker run "
            f"--shm-size={size.lower()}), or set data.num_workers=0 to read in threads."
        )
