"""Records what a data folder lacks, with `cwm_jax.tools.collect`."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from cwm_jax import controls, files
from cwm_jax.data import shards
from cwm_jax.errors import UserError, echo
from cwm_jax.runtime import subprograms

POLICY, SEED = "random=1,sticky=3", 1
HELD_OUT = 200  # records of val, and of test

# Of 1,500 records by POLICY: a record has 160 frames, or fewer if an episode ends.
_FRAMES_PER_RECORD = 117
_BYTES_PER_FRAME = 740  # compressed, on disk


def records_for(frames: int) -> int:
    """Number of records with about so many frames, in whole shards."""
    return 100 * math.ceil(frames / _FRAMES_PER_RECORD / 100)


class Recorded(NamedTuple):
    """The contents of a data folder."""

    by_us: bool  # there is a `metadata.json` of `cwm_jax.tools.collect`, or no data at all
    records: dict[str, int]  # complete records of each split, if known
    frames: int  # of train, if known
    wanted: dict[str, int]  # records of each split requested by the last call


def look_at(data: Path) -> Recorded:
    """The recorded contents of a data folder; empty if it does not exist."""
    none = dict.fromkeys(shards.SPLITS, 0)
    path = data / controls.METADATA
    if path.is_file():
        try:
            metadata = files.read_json_object(path)
            if "recipe" in metadata:
                of = metadata["splits"]
                records = {split: of[split]["records"] for split in shards.SPLITS}
                wanted = {split: of[split]["wanted"] for split in shards.SPLITS}
                return Recorded(True, records, of["train"]["frames"], wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error!r}") from None
    has_data = any((data / split).is_dir() for split in shards.SPLITS)
    return Recorded(not has_data, none, 0, none)


def record(data: Path, frames: int) -> None:
    """Records the missing frames of the folder, with all cores.

    Raises:
        UserError: there is too little disk, or the game cannot be played here.
    """
    have = look_at(data)
    if not have.by_us:
        echo(f"training on {data} as it is: it was not recorded by cwm_jax.tools.collect")
        return
    wanted = dict(train=records_for(frames), val=HELD_OUT, test=HELD_OUT)
    wanted = {split: max(count, have.wanted[split]) for split, count in wanted.items()}
    missing = sum(max(0, wanted[split] - have.records[split]) for split in wanted)
    if not missing:
        return
    needed, free = missing * _FRAMES_PER_RECORD * _BYTES_PER_FRAME, _free_disk(data)
    if needed > free:
        raise UserError(
            f"FRAMES={frames} (--frames): {missing} more records need about "
            f"{needed / 1e9:.1f} GB in {data}, and {free / 1e9:.1f} GB are free: free some, or "
            f"use fewer frames"
        )
    words = ["-m", "cwm_jax.tools.collect", "--output", str(data), "--policy", POLICY]
    words += ["--seed", str(SEED)]
    for split, count in wanted.items():
        words += [f"--{split}", str(count)]
    code = subprograms.run(words)
    if code == 2:
        raise UserError(
            f"{data} has {have.records['train']} of {wanted['train']} records, and more could "
            f"not be recorded. Install Procgen (make install-procgen; Linux on x86-64, Python 3.11 "
            f"or 3.12), or give a folder with train/ and val/: make pocket DATA=FOLDER"
        )
    if code:
        raise SystemExit(subprograms.status(code))


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
