"""Generates rollouts from a checkpoint and writes a video of them with the real clips.

    python sample.py --frames 64 --n-samples 4 --output generated.mp4
    python sample.py --checkpoint runs/small

Real frames are on top, generated ones below, the pressed keys under each. The checkpoint contains
the network's config; the data provides the frames that rollouts start from. Without --checkpoint
the repository's own model, `checkpoints/pocket`, is used.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax import files, shipped
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.coinrun import FPS
from cwm_jax.data import npz, shards
from cwm_jax.data.config import DataConfig
from cwm_jax.diffusion.schedule import NUM_LEVELS
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import model_flag, path_flag
from cwm_jax.rendering import contact_sheet, video
from cwm_jax.runtime import devices, random_numbers
from cwm_jax.sampling import rollouts, sampler

_MAX_FPS = 1000

_STABILIZATION = "noise level of the context + 1, 1…1000 (%(default)s)"
_CHECKPOINT = "a run, an export, or hf://USER/REPOSITORY[@REVISION] (checkpoints/pocket)"


def main() -> None:
    with shown_to_user():
        args = parser().parse_args()
        _check(args)
        source, pattern = _actions(args)
        settings = _sampler_settings(args)
        devices.check()
        checkpoint = pretrained.unless(args.checkpoint)
        opened = formats.open_sampler(checkpoint, step=args.step, **settings)
        script = rollouts.write_script(
            _data_config(args.data, opened),
            args.split,
            count=args.n_samples,
            frames=args.frames,
            n_prompt=args.n_prompt,
            num_actions=opened.sampler.network.action_values,
            source=source,
            pattern=pattern,
            seed=args.seed,
        )
        if script.real is None:
            print(
                f"no {args.n_samples} real clips have {args.frames} frames: generated frames only"
            )
        key = random_numbers.key(args.seed)
        frames = rollouts.write(
            opened.sampler, script, args.output, key=key, fps=args.fps, watched=True
        )
        print(f"step {opened.step} of {pretrained.shown(checkpoint)} → {args.output}")
        if args.grid:
            video.write_png(
                args.grid, contact_sheet.grid(script.real, frames, n_prompt=args.n_prompt)
            )
            print(f"contact sheet → {args.grid}")
        if args.save_npz:
            _save_npz(args.save_npz, script, frames, args.seed)
            print(f"raw frames → {args.save_npz}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add(
        "--data",
        type=path_flag,
        help="folder with train/, val/, test/ (that of the run, else the embedded one)",
    )
    add("--split", default="val", choices=shards.SPLITS, help="where clips come from (%(default)s)")
    add("--frames", type=int, default=32, help="length with the prompt; may exceed the window (32)")
    add("--n-samples", type=int, default=4, help="clips, each of a different episode (%(default)s)")
    add("--n-prompt", type=int, default=1, help="real frames to start from (%(default)s)")
    add("--ddim-steps", type=int, help="denoising steps a frame, 1…1000 (the model's own)")
    add("--noise-levels", default="", help="instead of steps: falling levels, such as 999,749,249")
    add("--eta", type=float, default=0.0, help="0: deterministic … 1: as random as DDPM (0)")
    add("--stabilization-level", type=int, default=15, help=_STABILIZATION)
    add("--window", default="exact", choices=sampler.WINDOWS, help="past the window (%(default)s)")
    add("--action-source", choices=rollouts.ACTION_SOURCES, help="(gt; with --pattern: pattern)")
    add("--pattern", help="actions to repeat, such as 7,7,7,8,8")
    add("--seed", type=int, default=0, help="of clips, random actions and noise (%(default)s)")
    add("--fps", type=int, default=FPS, help="frames a second of the video (%(default)s)")
    add("--output", type=path_flag, default=Path("generated.mp4"), help="or a .gif (%(default)s)")
    add("--grid", type=path_flag, help="also write a contact sheet to this PNG")
    add("--save-npz", type=path_flag, help="also write raw frames, actions and seed to this .npz")
    return parser


def _data_config(folder: Path | None, opened: formats.Opened) -> DataConfig:
    used = opened.config.get("data", {}).get("dir", "")
    if folder is None:
        folder = Path(os.path.expanduser(used)) if used else shipped.data()
        folder = folder if folder.is_dir() else shipped.data()
    return DataConfig(dir=str(folder))


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for invalid numbers and files before frames are generated."""
    sampler.check_seed(args.seed)
    if not 1 <= args.fps <= _MAX_FPS:
        raise UserError(f"--fps {args.fps}: must be 1…{_MAX_FPS}")
    for flag, value in (("--n-samples", args.n_samples), ("--n-prompt", args.n_prompt)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be 1 or more")
    if args.frames <= args.n_prompt:
        raise UserError(
            f"--frames {args.frames}: none of {args.frames} frames is left to generate; must be "
            f"more than --n-prompt {args.n_prompt}"
        )
    if not 1 <= args.stabilization_level <= NUM_LEVELS:
        raise UserError(f"--stabilization-level {args.stabilization_level}: must be 1…{NUM_LEVELS}")
    files.check_outputs(
        ("--output", args.output, video.SUFFIXES),
        ("--grid", args.grid, (video.PNG_SUFFIX,)),
        ("--save-npz", args.save_npz, (npz.SUFFIX,)),
    )


def _actions(args: argparse.Namespace) -> tuple[str, list[int]]:
    """Where the actions come from, and the pattern; a pattern alone is a source."""
    source = args.action_source or ("gt" if args.pattern is None else "pattern")
    if source != "pattern":
        if args.pattern is not None:
            raise UserError(
                f"--pattern {args.pattern} is not used with --action-source {source}; omit one"
            )
        return source, []
    if args.pattern is None:
        raise UserError("--action-source pattern: also give the pattern, such as --pattern 7,7,8")
    return source, _numbers("--pattern", args.pattern, "action numbers, such as 7,7,7,8,8")


def _sampler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplerConfig`; errors are reported before anything is opened."""
    fields = dict(window=args.window, eta=args.eta, context_level=args.stabilization_level - 1)
    if args.noise_levels and args.ddim_steps is not None:
        raise UserError(
            f"--ddim-steps {args.ddim_steps} and --noise-levels {args.noise_levels} both give the "
            "denoising steps; omit one"
        )
    if args.noise_levels:
        falling = _numbers("--noise-levels", args.noise_levels, "falling levels, such as 999,749")
        fields["levels"] = tuple(falling)
    elif args.ddim_steps is not None:
        fields["levels"] = sampler.ddim_levels(args.ddim_steps)
    sampler.SamplerConfig(**fields)
    return fields


def _numbers(flag: str, text: str, wanted: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: expected {wanted}") from None


def _save_npz(path: Path, script: rollouts.Script, frames: np.ndarray, seed: int) -> None:
    real = {} if script.real is None else {"real": script.real}
    numbers = {"n_prompt": script.n_prompt, "seed": seed}
    npz.write(path, {"frames": frames, "actions": script.actions, **numbers, **real})


if __name__ == "__main__":
    main()
