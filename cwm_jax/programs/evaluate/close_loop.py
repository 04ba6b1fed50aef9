"""`evaluate.py closed-loop`: the game and the model under the same keys, as a video."""

import argparse
from pathlib import Path

from cwm_jax.coinrun import FPS
from cwm_jax.evaluation import bootstrap, closed_loop, generation, rollout_quality
from cwm_jax.files import check_outputs, path_flag
from cwm_jax.programs.evaluate import flags
from cwm_jax.rendering import video
from cwm_jax.sampling import sampler
from cwm_jax.simulator import game, venv


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
    sampler.check_seed(args.seed)
    closed_loop.check(levels=args.levels, frames=args.frames, n_prompt=args.n_prompt)
    check_outputs(("--output", args.output, video.SUFFIXES))
    opened = flags.open_model(args)
    generation.check_game(opened.network)
    generate = generation.by_sampler(opened.sampler)
    levels = range(args.first_level, args.first_level + args.levels)
    keys = closed_loop.random_keys(args.levels, args.frames - 1, seed=args.seed)
    with game.Simulator(venv.ensure(args.simulator)) as simulator:
        replay = lambda runs: [run.frames for run in simulator.replay("coinrun", runs)]
        loop = closed_loop.play(
            generate, replay, levels, keys, n_prompt=args.n_prompt, seed=args.seed
        )
    psnr = bootstrap.of_mean(rollout_quality.capped(loop.scores.psnr).mean(1))
    print(
        f"{len(loop.levels)} of {args.levels} levels lasted {args.frames} frames\n"
        f"PSNR {psnr} dB (mean over frames and levels)",
        flush=True,
    )
    video.write_video(args.output, closed_loop.video_images(loop), fps=FPS)
    print(f"video → {args.output}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called("closed-loop"),
        description="Plays the real game (Procgen) and the model under the same keys, and writes "
        "a video of both with PSNR over time.",
    )
    add = made.add_argument
    add("--levels", type=int, default=4, help="how many levels to play (%(default)s)")
    add("--first-level", type=int, default=2_000_000_000, help="seed of the first (%(default)s)")
    add("--frames", type=int, default=64, help="length with the prompt (%(default)s)")
    add("--n-prompt", type=int, default=1, help="real frames to start from (%(default)s)")
    add("--output", type=path_flag, default=Path("closed_loop.mp4"), help="(%(default)s)")
    add(
        "--simulator",
        type=path_flag,
        help="folder of its environment (.venv-procgen; made if absent)",
    )
    flags.add_generation(add)
    return made
