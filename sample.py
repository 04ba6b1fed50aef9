"""Draws rollouts from a checkpoint and writes them beside the real clips.

    python sample.py --checkpoint runs/small --frames 64 --n-samples 4 --output generated.mp4

Real frames on top, generated ones below, the pressed keys under each. Only the checkpoint is
needed to know the network; `--data` gives the real clips that rollouts start from.
"""

import argparse
from pathlib import Path

from cwm_jax import offline
from cwm_jax.coinrun import FPS
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.sampler import WINDOWS


def main() -> None:
    args = _parser().parse_args()
    with shown_to_user():
        offline.sample(offline.SampleRequest(**vars(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's workdir, or one checkpoint in it")
