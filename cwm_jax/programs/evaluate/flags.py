"""What the jobs of `evaluate.py` share: flags, and opening the model that they name."""

import argparse
import dataclasses
import sys
from pathlib import Path

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.errors import UserError
from cwm_jax.files import model_flag
from cwm_jax.runtime import devices
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import Sampler

_CHECKPOINT = "a run, an export, or hf://USER/REPOSITORY[@REVISION] (checkpoints/pocket)"


def add_model(add) -> None:
    """Which model a job is of."""
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")


def add_generation(add) -> None:
    """Which model generates frames, and how."""
    add_model(add)
    add("--ddim-steps", type=int, help="denoising steps a frame, 1…1000 (the model's own)")
    add("--window", default="exact", choices=sampler.WINDOWS, help="past the window (%(default)s)")
    add("--seed", type=int, default=0, help="of noise and random actions (%(default)s)")


def open_model(args: argparse.Namespace) -> formats.Opened:
    how = {"window": args.window}
    if args.ddim_steps is not None:
        how["levels"] = sampler.ddim_levels(args.ddim_steps)
    devices.check()
    args.checkpoint = pretrained.unless(args.checkpoint)
    opened = formats.open_sampler(args.checkpoint, step=args.step, **how)
    power = getattr(args, "sharpness", opened.network.warp_sharpness)
    if power == opened.network.warp_sharpness or not opened.network.warp_reach:
        return opened
    if not isinstance(opened.sampler, Sampler):
        raise UserError(f"{args.checkpoint} is a bundle, whose warp sharpness is fixed")
    network = dataclasses.replace(opened.network, warp_sharpness=power)
    sharper = Sampler(network, opened.params, opened.sampler.config)
    return opened._replace(network=network, sampler=sharper)


def called(job: str = "") -> str:
    """How a job of this program was called, for its usage."""
    name = Path(sys.argv[0]).name
    return f"{'evaluate' if name == '__main__.py' else name} {job}".strip()


def numbers(text: str, flag: str = "--n-prompt", such_as: str = "1,4", kind: type = int) -> tuple:
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise UserError(f"{flag} {text}: expected {whole}numbers, such as {such_as}") from None
