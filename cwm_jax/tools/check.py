"""Reads every record of a data folder and reports bad ones.

    python -m cwm_jax.tools.check data/coinrun
    python -m cwm_jax.tools.check data/mine --repair data/mended

Bad records are named by shard and index; so are duplicates of an episode. The
exit code is 1 if there are any. `--repair` writes the good ones to a new folder, each once; if it
is interrupted, run the same command again.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cwm_jax import controls, files, shipped
from cwm_jax.controls import Controls
from cwm_jax.data import inferred_actions, records, shards
from cwm_jax.data.clips import clip_counts
from cwm_jax.data.records import BadRecord
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag

_MARK = ".repaired_from"  # in a repaired folder: the path of the original folder


@dataclasses.dataclass
class Shard:
    """The contents of one shard."""

    path: Path
    lengths: dict[int, int]  # frames of each good record, by its index
    digests: dict[int, bytes]  # of frames and actions of each
    sizes: dict[int, int]  # bytes of each
    actions: np.ndarray  # how often each action was pressed
    bad: list[BadRecord]
    unreadable: str = ""  # why it could not be read


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record, or a whole shard, that is not fit for training."""

    shard: Path
    index: int | None  # None: the whole shard
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.index is None else f', record {self.index}'}: " + (
            self.reason
        )


def read_shard(path: Path, num_actions: int) -> Shard:
    """Decodes every record of a shard; its faults are part of the result."""
    found = Shard(path, {}, {}, {}, np.zeros(num_actions, int), [])
    try:
        shards.check_sizes(path, shards.record_sizes(path) or ())
        reader = shards.open_shard(path)
    except UserError as error:
        found.unreadable = str(error).removeprefix(f"{path}")
        return found
    for index in range(reader.num_records()):
        try:
            record = shards.read_record(reader, path, index)
            episode = records.decode(record, num_actions=num_actions)
        except BadRecord as bad:
            found.bad.append(BadRecord(bad.reason, path, index))
            continue
        digest = hashlib.sha256(episode.frames.data)
        digest.update(episode.actions.data)
        found.lengths[index], found.sizes[index] = len(episode), len(record)
        found.digests[index] = digest.digest()
        found.actions += np.bincount(episode.actions, minlength=num_actions)
    return found


def faults(found: Sequence[Shard]) -> list[Fault]:
    """All faults of all splits: an episode in two splits is a fault of the second."""
    seen: dict[bytes, str] = {}
    frames_of_size: dict[tuple[Path, int], int] = {}
    wrong = []
    for shard in found:
        if shard.unreadable:
            wrong.append(Fault(shard.path, None, f"unreadable{shard.unreadable}"))
        wrong += [Fault(shard.path, bad.index, bad.reason) for bad in shard.bad]
        for index, digest in shard.digests.items():
            length, size = shard.lengths[index], (shard.path.parent, shard.sizes[index])
            if (first := seen.setdefault(digest, f"{shard.path}, record {index}")) and (
                first != f"{shard.path}, record {index}"
            ):
                wrong.append(Fault(shard.path, index, f"the same episode as {first}"))
            elif frames_of_size.setdefault(size, length) != length:
                reason = f"{size[1]} bytes for {length} frames; others have {frames_of_size[size]}"
                wrong.append(Fault(shard.path, index, reason))
    return wrong


def read_folder(folder: Path, *, jobs: int) -> tuple[Controls, list[Shard]]:
    """Every shard of every existing split, read in parallel.

    Raises:
        UserError: there are no shards at all.
    """
    known = controls.read(folder)
    paths = [p for split in shards.SPLITS for p in sorted((folder / split).glob(shards.PATTERN))]
    if not paths:
        shards.find_shards(folder, "train")  # raises what is missing and how to get it
    with ThreadPoolExecutor(jobs) as pool:
        read = pool.map(lambda path: read_shard(path, known.num_values), paths)
        return known, list(tqdm(read, "Reading", len(paths), unit=" shards"))


def summary(
    known: Controls, found: Sequence[Shard], *, clip_len: int, stride: int
) -> Iterator[str]:
    """The report's lines, split by split."""
    for split in shards.SPLITS:
        mine = [shard for shard in found if shard.path.parent.name == split]
        lengths = np.array([n for shard in mine for n in shard.lengths.values()], int)
        if not mine:
            yield f"{split}: no shards"
            continue
        clips = int(clip_counts(lengths, clip_len, stride).sum())
        yield (
            f"{split}: {len(mine)} shards, {len(lengths)} readable records, "
            f"{lengths.sum()} frames, {clips} clips of {clip_len} frames"
        )
        counts = collections.Counter(lengths.tolist()).most_common(8)
        yield "  lengths: " + ", ".join(f"{n} × {length} frames" for length, n in counts)
        yield "  actions: " + _histogram(known, sum(shard.actions for shard in mine))


def _histogram(known: Controls, counts: np.ndarray) -> str:
    total = max(1, counts.sum())
    used = sorted(np.nonzero(counts)[0], key=lambda action: -counts[action])[:16]
    return ", ".join(f"{known.name(int(a))} {100 * counts[a] / total:.1f} %" for a in used)


def repair(
    folder: Path, out: Path, found: Iterable[Shard], wrong: Sequence[Fault], *, jobs: int
) -> int:
    """Writes all records except bad ones to `out`, shard by shard; returns how many.

    Raises:
        UserError: `out` is the folder that is read, contains something else, or cannot be written.
    """
    _claim(folder, out)
    dropped = {(fault.shard, fault.index) for fault in wrong}

    def write(shard: Shard) -> int:
        kept = [i for i in shard.lengths if (shard.path, i) not in dropped]
        if kept:
            reader = shards.open_shard(shard.path)
            target = out / shard.path.parent.name / shard.path.name
            with files.written_whole(target) as temporary:
                good = (shards.read_record(reader, shard.path, i) for i in kept)
                shards.write_shard(temporary, good)
        return len(kept)

    found = list(found)
    with ThreadPoolExecutor(jobs) as pool:
        written = sum(tqdm(pool.map(write, found), "Writing", len(found), unit=" shards"))
    if (folder / controls.METADATA).is_file():
        shutil.copyfile(folder / controls.METADATA, out / controls.METADATA)
    return written


def _claim(folder: Path, out: Path) -> None:
    """Makes sure that `out` is empty, and marks it; or that it was repaired from the same folder.

    Raises:
        UserError: it is neither, or a folder that is read.
    """
    taken = {folder.resolve(), *((folder / split).resolve() for split in shards.SPLITS)}
    if out.resolve() in taken:
        raise UserError(f"--repair {out}: choose another folder, not one of {folder}")
    mark, source = out / _MARK, files.place_digest(folder)
    if mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == source:
        return
    if mark.is_file() or (out.is_dir() and files.visible(out)):
        raise UserError(f"--repair {out}: it contains something else; choose a new folder")
    with files.written_whole(mark) as temporary:
        temporary.write_text(source, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        args.folder = shipped.found(args.folder)
        for flag in ("clip_len", "stride", "jobs"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be 1 or more")
        known, found = read_folder(args.folder, jobs=args.jobs)
        wrong = faults(found)
        for line in summary(known, found, clip_len=args.clip_len, stride=args.stride):
            print(line)
        if note := inferred_actions.note(args.folder):
            print(note)
        for fault in wrong:
            print(f"BAD {fault}")
        print(f"{len(wrong) or 'no'} fault{'' if len(wrong) == 1 else 's'}")
        if args.repair:
            written = repair(args.folder, args.repair, found, wrong, jobs=args.jobs)
            print(f"{written} good records → {args.repair}")
    if wrong and not args.repair:
        raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=path_flag, help="data folder with train/, val/, test/")
    add("--repair", type=path_flag, metavar="OUT", help="write the good records to this folder")
    add("--clip-len", type=int, default=32, help="frames, to count clips (%(default)s)")
    add("--stride", type=int, default=8, help="frames between clips (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="shards at a time (one for each core)")
    return parser


if __name__ == "__main__":
    main()
