"""Measures a world model, and writes the numbers and an HTML report.

    python evaluate.py --checkpoint runs/small --data data/coinrun --output metrics.json
    python evaluate.py compare small.json large.json
    python evaluate.py compare --across levels 1_step.json 4_steps.json 10_steps.json
    python evaluate.py settings --checkpoint model.safetensors --steps 1,2,4 --write
    python evaluate.py closed-loop --checkpoint runs/small --output closed_loop.mp4
    python evaluate.py outcomes --checkpoint checkpoints/pocket --data data/mine

docs/evaluation.md explains each number. Without --checkpoint the repository's own model,
`checkpoints/pocket`, is measured.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import jax

from cwm_jax import shipped
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.coinrun import FPS
from cwm_jax.data import shards, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.evaluation import (
    bootstrap,
    closed_loop,
    comparison,
    full,
    generation,
    generation_settings,
    held_out,
    i3d_weights,
    lpips_weights,
    outcomes,
    protocol,
    rollout_quality,
    video_distance,
)
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.files import model_flag, path_flag
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.rendering import video
from cwm_jax.runtime import devices, user_cache
from cwm_jax.sampling import sampler
from cwm_jax.sampling.sampler import Sampler
from cwm_jax.sampling.worlds import WorldGenerator
from cwm_jax.simulator import game, venv

_CHECKPOINT = "a run, an export, or hf://USER/REPOSITORY[@REVISION] (checkpoints/pocket)"


def main() -> None:
    with shown_to_user():
        match sys.argv[1:2]:
            case ["compare"]:
                compare(sys.argv[2:])
            case ["settings"]:
                rank_settings(sys.argv[2:])
            case ["closed-loop"]:
                close_the_loop(sys.argv[2:])
            case ["outcomes"]:
                measure_outcomes(sys.argv[2:])
            case _:
                measure(parser().parse_args())


def measure(args: argparse.Namespace) -> None:
    plan = full.Plan(
        split=args.split,
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=_numbers(args.n_prompt),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
        seeds=args.seeds,
        single_step=not args.no_single_step,
    )
    videos = _video_plan(args)
    measured = _measured(args, plan, lpips_weights.available(), videos)
    results = measured.results
    full.write_json(args.output, results)
    report = args.report or args.output.parent / f"{args.output.stem}_report"
    pictures = "" if args.no_report else _write_report(report, measured, plan)
    used = results["clips"]
    print(
        f"{used['used']} of {used['records']} records of {args.data}/{args.split} used "
        f"({used['too_short']} have fewer than {plan.frames} frames)\n"
        f"{comparison.table([(args.output.name, results)])}\n"
        f"numbers → {args.output}{pictures}"
    )


def _video_plan(args: argparse.Namespace) -> video_distance.Plan | None:
    """The settings of KVD; None if it is not requested."""
    if not args.kvd:
        return None
    shared = dict(split=args.split, seed=args.seed, batch_size=args.batch_size)
    return video_distance.Plan(clips=args.kvd, force=args.force, **shared)


def _measured(
    args: argparse.Namespace,
    plan: full.Plan,
    lpips: Lpips | None,
    videos: video_distance.Plan | None = None,
) -> full.Measured:
    i3d = i3d_weights.available() if videos else None
    opened = _open(args)
    config = DataConfig(
        dir=str(args.data),
        clip_len=min(opened.network.max_frames, DataConfig.clip_len),
    )
    measured = full.measure(
        opened.network,
        opened.params,
        opened.sampler,
        config,
        plan,
        probes=args.probes or user_cache.folder(),
        lpips=lpips,
        watched=True,
    )
    if i3d:
        generate = generation.by_sampler(opened.sampler)
        found = video_distance.measure(generate, i3d, config, videos, watched=True)
        measured.results["videos"] = found
    measured.results["checkpoint"] = dict(
        path=pretrained.shown(args.checkpoint),
        step=opened.step,
        fingerprint=fingerprint(opened.network, opened.params).hex(),
    )
    measured.results["code"] = protocol.code_version()
    measured.results["device"] = jax.devices()[0].device_kind
    return measured


def _write_report(folder: Path, measured: full.Measured, plan: full.Plan) -> str:
    """Returns the line to print about the report. A failure does not affect the numbers."""
    try:
        from cwm_jax.evaluation import html_report  # imports Matplotlib, which reads its settings

        html_report.write(folder, measured, plan)
    except UserError:
        raise
    except Exception as error:
        echo(f"WARNING: no report was written: {type(error).__name__}: {error}")
        return ""
    return f"\npictures → {folder / html_report.FILE}"


def compare(words: list[str]) -> None:
    args = _compare_flags().parse_args(words)
    measured = [(str(path), comparison.read(path)) for path in args.metrics]
    print(comparison.table(measured, across=[x for x in args.across.split(",") if x]))


def _compare_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_called("compare"), description="A table of measurements made under one protocol."
    )
    parser.add_argument("metrics", nargs="+", type=path_flag, help="metrics.json files")
    parser.add_argument(
        "--across",
        default="",
        help="conditions that may differ: one or more of " + ",".join(protocol.VARIABLE),
    )
    return parser


def rank_settings(words: list[str]) -> None:
    args = _settings_flags().parse_args(words)
    plan = full.Plan(
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=(args.n_prompt,),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
        seeds=0,
    )
    numbers = _numbers(args.steps, "--steps", "1,2,4")
    for steps in numbers:
        sampler.ddim_levels(steps)  # raises for an invalid number
    args.checkpoint = pretrained.unless(args.checkpoint)
    file = generation_settings.writable(args.checkpoint) if args.write else None
    lpips = lpips_weights.available()
    if lpips is None:
        raise UserError(
            f"settings are ranked by LPIPS: `{lpips_weights.FETCH}` downloads its weights"
        )
    network = formats.load(args.checkpoint, step=args.step).network
    powers = args.sharpness and _numbers(args.sharpness, "--sharpness", "1,4", float)
    powers = generation_settings.sharpnesses(network, powers)
    found = []
    for window, steps, power in itertools.product(args.windows, numbers, powers):
        how = dict(window=window, ddim_steps=steps, sharpness=power)
        how = argparse.Namespace(**vars(args) | how)
        results = _measured(how, plan, lpips).results
        sharp = "" if power == 1 else f"_{power:g}"
        full.write_json(args.output / f"{steps}_{window}{sharp}.json", results)
        found.append(generation_settings.Setting(steps, window, results, power))
    judged = generation_settings.judge(found)
    print(generation_settings.table(judged))
    answer = generation_settings.answer(judged)
    print(answer or "no setting is playable")
    if file and answer:
        generation_settings.write(file, answer)
        print(f"→ {file}")


def _settings_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_called("settings"),
        description="Ranks numbers of denoising steps, windows and, for networks with softmax "
        "filters, their sharpness by LPIPS, readable keys and the length of stable rollouts, and "
        "prints the recommended ones.",
    )
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--steps", default="1,2,4,10", help="denoising steps a frame (%(default)s)")
    add(
        "--sharpness",
        help="powers of the warp's softmax filters (1 and 4; without effect on other networks)",
    )
    add("--windows", nargs="+", default=["hop"], choices=sampler.WINDOWS, help="(hop)")
    add(
        "--data",
        type=path_flag,
        default=shipped.data(),
        help="folder with train/, val/, test/ (embedded)",
    )
    add("--clips", type=int, default=0, help="0: all that are long enough (0)")
    add("--horizon", type=int, default=20, help="frames that LPIPS is averaged over (%(default)s)")
    add("--n-prompt", type=int, default=4, help="real frames to start from (%(default)s)")
    add("--drift-frames", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=32, help="clips at once (%(default)s)")
    add("--seed", type=int, default=0, help="of noise and random actions (%(default)s)")
    add("--probes", type=path_flag, help="folder where trained probes are kept (~/.cache/cwm_jax)")
    add(
        "--output", type=path_flag, default=Path("settings"), help="folder of numbers (%(default)s)"
    )
    add("--write", action="store_true", help="write the result to the model's safetensors file")
    return parser


def close_the_loop(words: list[str]) -> None:
    args = _loop_flags().parse_args(words)
    sampler.check_seed(args.seed)
    closed_loop.check(levels=args.levels, frames=args.frames, n_prompt=args.n_prompt)
    opened = _open(args)
    generation.check_game(opened.network)
    generate = generation.by_sampler(opened.sampler)
    levels = range(args.first_level, args.first_level + args.levels)
    keys = closed_loop.random_keys(args.levels, args.frames - 1, seed=args.seed)
    with game.Simulator(venv.ensure(args.simulator)) as simulator:
        replay = lambda runs: [run.frames for run in simulator.replay("coinrun", runs)]
        loop = closed_loop.play(
            generate, replay, levels, keys, n_prompt=args.n_prompt, seed=args.seed
        )
    video.write_video(args.output, closed_loop.video_images(loop), fps=FPS)
    psnr = bootstrap.of_mean(rollout_quality.capped(loop.scores.psnr).mean(1))
    print(
        f"{len(loop.levels)} of {args.levels} levels lasted {args.frames} frames\n"
        f"PSNR {psnr} dB (mean over frames and levels) → {args.output}"
    )


def _loop_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_called("closed-loop"),
        description="Plays the real game (Procgen) and the model under the same keys, and writes "
        "a video of both with PSNR over time.",
    )
    add = parser.add_argument
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
    _add_generation_flags(add)
    return parser


def measure_outcomes(words: list[str]) -> None:
    args = _outcome_flags().parse_args(words)
    sampler.check_seed(args.seed)
    trained = formats.load(pretrained.unless(args.checkpoint), step=args.step)
    outcomes.check(trained.network, trained.path)
    config = DataConfig(dir=str(args.data))
    episodes = splits.open_episodes(config, args.split, outcomes=True)
    length = trained.network.max_frames
    eligible = held_out.long_enough(episodes, config, args.split, frames=length)
    count = args.records or len(eligible)
    numbers = splits.pick_episodes(episodes, count=count, length=length, seed=args.seed)
    predicted = outcomes.of_records(trained.network, trained.params, episodes, numbers)
    results = {"real_frames": outcomes.summary(predicted)}
    print(
        outcomes.table(f"real frames of {len(predicted)} records", results["real_frames"]),
        flush=True,
    )
    if args.ahead:
        steps = formats.usual_steps(trained) if args.ddim_steps is None else args.ddim_steps
        how = sampler.SamplerConfig(levels=sampler.ddim_levels(steps))
        generator = WorldGenerator(trained.network, trained.params, how)
        predicted = outcomes.of_rollouts(
            generator, episodes, numbers, ahead=args.ahead, seed=args.seed
        )
        results["rollouts"] = outcomes.summary(predicted)
        print(
            outcomes.table(f"{len(predicted)} rollouts of {args.ahead} frames", results["rollouts"])
        )
    results["conditions"] = {"records": count, "split": args.split, "ahead": args.ahead}
    results["conditions"] |= {
        "seed": args.seed,
        "fingerprint": protocol.fingerprint(trained.params),
    }
    full.write_json(args.output, results)
    print(f"numbers → {args.output}")


def _outcome_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py outcomes",
        description="How well a model's heads predict rewards and ends of episodes, on real "
        "and on generated frames.",
    )
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--data", type=path_flag, required=True, help="folder with rewards (tools.collect)")
    add("--split", default="test", choices=shards.SPLITS, help="(%(default)s)")
    add("--records", type=int, default=0, help="0: all that are long enough (0)")
    add("--ahead", type=int, default=16, help="frames of a rollout; 0: none (%(default)s)")
    add("--ddim-steps", type=int, help="denoising steps of rollouts (the model's own)")
    add("--seed", type=int, default=0, help="of records, places and noise (%(default)s)")
    add("--output", type=path_flag, default=Path("outcomes.json"), help="(%(default)s)")
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = full.Plan()
    _add_generation_flags(add)
    add(
        "--data",
        type=path_flag,
        default=shipped.data(),
        help="folder with train/, val/, test/ (the embedded one)",
    )
    add("--output", type=path_flag, default=Path("metrics.json"), help="(%(default)s)")
    add("--report", type=path_flag, help="folder of report.html (beside the output, OUTPUT_report)")
    add("--no-report", action="store_true", help="numbers only")
    add("--split", default=default.split, choices=shards.SPLITS, help="(%(default)s)")
    add("--clips", type=int, default=default.clips, help="0: all that are long enough (0)")
    add("--horizon", type=int, default=default.horizon, help="frames to generate (%(default)s)")
    add("--n-prompt", default="1,4", help="real frames to start from (%(default)s)")
    add("--drift-frames", type=int, default=default.drift_frames, help="(%(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="clips at once (%(default)s)")
    add("--probes", type=path_flag, help="folder where trained probes are kept (~/.cache/cwm_jax)")
    add(
        "--seeds",
        type=int,
        default=default.seeds,
        help="rollouts with other noise, whose spread is compared with the error (%(default)s)",
    )
    add("--no-single-step", action="store_true", help="skip single steps on the whole split")
    add(
        "--kvd",
        type=int,
        default=0,
        metavar="CLIPS",
        help=f"KVD and FVD of so many videos, {video_distance.MIN_CLIPS} or more (0: none)",
    )
    add("--force", action="store_true", help="KVD of fewer videos too")
    return parser


def _add_generation_flags(add) -> None:
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--ddim-steps", type=int, default=10, help="denoising steps a frame, 1…1000 (%(default)s)")
    add("--window", default="exact", choices=sampler.WINDOWS, help="past the window (%(default)s)")
    add("--seed", type=int, default=0, help="of noise and random actions (%(default)s)")


def _open(args: argparse.Namespace) -> formats.Opened:
    levels = sampler.ddim_levels(args.ddim_steps)
    devices.check()
    args.checkpoint = pretrained.unless(args.checkpoint)
    how = dict(levels=levels, window=args.window)
    opened = formats.open_sampler(args.checkpoint, step=args.step, **how)
    power = getattr(args, "sharpness", opened.network.warp_sharpness)
    if power == opened.network.warp_sharpness or not opened.network.warp_reach:
        return opened
    if not isinstance(opened.sampler, Sampler):
        raise UserError(f"{args.checkpoint} is a bundle, whose warp sharpness is fixed")
    network = dataclasses.replace(opened.network, warp_sharpness=power)
    sharper = Sampler(network, opened.params, opened.sampler.config)
    return opened._replace(network=network, sampler=sharper)


def _called(job: str) -> str:
    return f"{Path(sys.argv[0]).name} {job}"


def _numbers(text: str, flag: str = "--n-prompt", such_as: str = "1,4", kind: type = int) -> tuple:
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise UserError(f"{flag} {text}: expected {whole}numbers, such as {such_as}") from None


SUBCOMMANDS = {
    "compare": _compare_flags,
    "settings": _settings_flags,
    "closed-loop": _loop_flags,
}

if __name__ == "__main__":
    main()
