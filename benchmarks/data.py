"""Speed of reading clips from disk, compared with that of reading only.

    python -m benchmarks.data --dir assets/coinrun --batch 128 --seconds 8

Three rates, in clips a second, each in total and for each second of a processor: the training
batches, shuffled over the whole dataset; the same records read but not decoded (the
limit); and one clip from each record, read and decoded in order of the records. It also
measures shuffling: the mean number of episodes in a batch.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator

import numpy as np

from cwm_jax.data import loader, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.data.shards import find_shards, open_shard, read_record
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.runtime import process_memory

_BATCHES = "training batches, global shuffle"


def rate(counts: Iterator[int], seconds: float) -> dict[str, float]:
    """Clips a second from an iterator of numbers of clips; the first item is not counted.

    `per_core` and `cores` count only this process's processor time.
    """
    next(counts)
    clips, start, cpu = 0, time.perf_counter(), time.process_time()
    for count in counts:
        clips += count
        if time.perf_counter() - start > seconds:
            break
    took, used = time.perf_counter() - start, time.process_time() - cpu
    return {"clips_per_s": clips / took, "per_core": clips / used, "cores": used / took}


def batches(config: DataConfig, batch: int) -> Iterator[int]:
    source = loader.train_batches(config, batch_size=batch, seed=0)
    try:
        for found in source:
            yield len(found["frames"])
    finally:
        source.close()


def episodes_per_batch(config: DataConfig, batch: int, *, batches: int = 20) -> float:
    """Different records among the clips of a training batch, on average; nothing is read."""
    source = loader.train_batches(config, batch_size=batch, seed=0)
    numbers = range(min(batches, source.per_epoch))
    episodes = [{(clip["shard"], clip["record"]) for clip in source.origins(i)} for i in numbers]
    return float(np.mean([len(found) for found in episodes]))


def records_alone(config: DataConfig) -> Iterator[int]:
    """Each record, not decoded, in a random order, endlessly; each counts as one clip."""
    shards = find_shards(config.dir, "train")
    readers = [open_shard(shard) for shard in shards]
    places = [(s, i) for s, reader in enumerate(readers) for i in range(reader.num_records())]
    rng = np.random.default_rng(0)
    while True:
        for place in rng.permutation(len(places)):
            shard, index = places[place]
            read_record(readers[shard], shards[shard], index)
            yield 1


def one_clip_of_each_record(config: DataConfig) -> Iterator[int]:
    episodes = splits.open_episodes(config, "train")
    long_enough = np.flatnonzero(episodes.lengths >= config.clip_len)
    for number in itertools.cycle(long_enough):
        splits.load_clips(episodes, [number], length=config.clip_len)
        yield 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=path_flag, default="assets/coinrun")
    parser.add_argument("--batch", type=int, default=128, help="clips")
    parser.add_argument("--clip-len", type=int, default=DataConfig.clip_len, help="frames")
    parser.add_argument("--stride", type=int, default=DataConfig.stride, help="frames")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each of the rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="reading processes; 0: threads")
    parser.add_argument("--output", type=path_flag, help="JSON file of the numbers")
    args = parser.parse_args()
    process_memory.keep_freed()  # as train.py does
    config = DataConfig(
        dir=str(args.dir),
        clip_len=args.clip_len,
        stride=args.stride,
        num_threads=args.threads,
        num_workers=args.workers,
    )
    counts = {
        _BATCHES: batches(config, args.batch),
        "records read, not decoded": records_alone(config),
        "one clip of each record, in order": one_clip_of_each_record(config),
    }
    found = {name: rate(source, args.seconds) for name, source in counts.items()}
    if args.workers:
        found[_BATCHES] = {"clips_per_s": found[_BATCHES]["clips_per_s"]}
    print(f"{os.cpu_count()} cores, {args.threads} threads, {args.workers} reading processes")
    for name, numbers in found.items():
        each = f", {numbers['per_core']:7.0f} a core" if "per_core" in numbers else ""
        print(f"{name:36} {numbers['clips_per_s']:7.0f} clips/s{each}")
    found["episodes_per_batch"] = episodes_per_batch(config, args.batch)
    print(f"{found['episodes_per_batch']:.1f} episodes in a batch of {args.batch} clips")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with shown_to_user():
        main()
