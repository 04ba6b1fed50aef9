"""Coverage-guided fuzzing of the record decoder.

    pip install atheris
    python -m tests.faults.fuzz_records -atheris_runs=1000000 -rss_limit_mb=2048

Every input is decoded as a record, and must either be an episode or raise `BadRecord`; no other
error may be raised, and no input may take more than 2 s, or too much memory for its length. The
flags are libFuzzer's. It starts from real records of every supported pickle protocol.
"""

import pickle
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["cwm_jax"]):
    from cwm_jax.coinrun import FRAME_SHAPE
    from cwm_jax.data.records import BadRecord, Episode, decode, encode


def one_input(data: bytes) -> None:
    try:
        episode = decode(data)
    except BadRecord:
        return
    if len(episode.actions) != len(episode) or not episode.frames.size:
        raise AssertionError("decoded to no episode")


def seeds() -> list[bytes]:
    """Small records: complete ones, and ones without video, which mutate faster."""
    rng = np.random.default_rng(0)
    episode = Episode(
        rng.integers(0, 256, (1, *FRAME_SHAPE), np.uint8), rng.integers(0, 15, 1, np.int32)
    )
    fields = {
        "raw_video": b"",
        "sequence_length": np.int64(1),
        "actions": np.arange(3),
        "more": [None, True, 2.5, ("text", {"a": -1})],
    }
    return [encode(episode), *(pickle.dumps(fields, protocol) for protocol in (3, 4, 5))]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        arguments = ["-timeout=2", "-max_len=16384", *sys.argv[1:], folder]
        atheris.Setup([sys.argv[0], *arguments], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
