"""`evaluate.py compare`: a table of measurements made under one protocol."""

import argparse

from cwm_jax.evaluation import comparison, protocol
from cwm_jax.files import path_flag
from cwm_jax.programs.evaluate import flags


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
    measured = [(str(path), comparison.read(path)) for path in args.metrics]
    print(comparison.table(measured, across=[x for x in args.across.split(",") if x]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called("compare"), description="A table of measurements made under one protocol."
    )
    made.add_argument("metrics", nargs="+", type=path_flag, help="metrics.json files")
    made.add_argument(
        "--across",
        default="",
        help="conditions that may differ: one or more of " + ",".join(protocol.VARIABLE),
    )
    return made
