"""Measures how good a world model is, and gathers numbers and pictures in one page.

    python evaluate.py --checkpoint runs/small --data data/coinrun --output metrics.json
    python evaluate.py compare small.json large.json
    python evaluate.py compare --across levels 1_step.json 4_steps.json 10_steps.json
    python evaluate.py settings --checkpoint model.safetensors --steps 1,2,4 --write
    python evaluate.py closed-loop --checkpoint runs/small --output closed_loop.mp4

docs/evaluation.md says what each number means. Without --checkpoint the repository's own model is
measured, `checkpoints/pocket`.
"""

import argparse
import itertools
import sys
from pathlib import Path

import jax

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.coinrun import FPS
from cwm_jax.data import shards
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, shown_to_user, tell
from cwm_jax.evaluation import (
    bootstrap,
    closed_loop,
    comparison,
    full,
    generation,
    generation_settings,
    lpips_weights,
    protocol,
    rollout_quality,
)
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.files import path_flag
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.rendering import video
from cwm_jax.runtime import devices, user_cache
from cwm_jax.sampling import sampler
from cwm_jax.simulator import game, venv

_EMBEDDED = Path(__file__).parent / "assets" / "coinrun"


def main() -> None:
    with shown_to_user():
        match sys.argv[1:2]:
            case ["compare"]:
                compare(sys.argv[2:])
            case ["settings"]:
                rank_settings(sys.argv[2:])
            case ["closed-loop"]:
                close_the_loop(sys.argv[2:])
            case _:
                measure(_flags().parse_args())


def measure(args: argparse.Namespace) -> None:
    plan = full.Plan(
        split=args.split,
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=_numbers(args.n_prompt),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    measured = _measured(args, plan, lpips_weights.available())
    results = measured.results
    full.write_json(args.output, results)
    report = args.report or args.output.parent / f"{args.output.stem}_report"
    pictures = _write_report(report, measured, plan)
    used = results["clips"]
    print(
        f"{used['used']} of {used['records']} records of {args.data}/{args.split} used "
        f"({used['too_short']} have fewer than {plan.frames} frames)\n"
        f"{comparison.table([(args.output.name, results)])}\n"
        f"numbers → {args.output}{pictures}"
    )


def _measured(args: argparse.Namespace, plan: full.Plan, lpips: Lpips | None) -> full.Measured:
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
    measured.results["checkpoint"] = dict(
        path=pretrained.NAME if args.checkpoint == pretrained.FOLDER else str(args.checkpoint),
        step=opened.step,
        fingerprint=fingerprint(opened.network, opened.params).hex(),
    )
    measured.results["code"] = protocol.code_version()
    measured.results["device"] = jax.devices()[0].device_kind
    return measured


def _write_report(folder: Path, measured: full.Measured, plan: full.Plan) -> str:
    """Returns what to print of the report. The numbers, which take long, stand without it."""
    try:
        from cwm_jax.evaluation import html_report  # Matplotlib, which reads its settings here

        html_report.write(folder, measured, plan)
    except UserError:
        raise
    except Exception as error:
        tell(f"WARNING: there is no report: {type(error).__name__}: {error}")
        return ""
    return f"\npictures → {folder / html_report.FILE}"


def compare(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate.py compare", description="A table of measurements made under one protocol."
    )
    parser.add_argument("metrics", nargs="+", type=path_flag, help="metrics.json files")
    parser.add_argument(
        "--across",
        default="",
        help="conditions that may differ: one or more of " + ",".join(protocol.VARIABLE),
    )
    args = parser.parse_args(words)
    measured = [(str(path), comparison.read(path)) for path in args.metrics]
    print(comparison.table(measured, across=[x for x in args.across.split(",") if x]))


def rank_settings(words: list[str]) -> None:
    args = _settings_flags().parse_args(words)
    plan = full.Plan(
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=(args.n_prompt,),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    numbers = _numbers(args.steps, "--steps", "1,2,4")
    for steps in numbers:
        sampler.ddim_levels(steps)  # raises where there is no such number
    args.checkpoint = pretrained.unless(args.checkpoint)
    file = generation_settings.writable(args.checkpoint) if args.write else None
    lpips = lpips_weights.available()
    if lpips is None:
        raise UserError(f"settings are ranked by LPIPS: `{lpips_weights.FETCH}` gets its weights")
    found = []
    for window, steps in itertools.product(args.windows, numbers):
        how = argparse.Namespace(**vars(args) | {"window": window, "ddim_steps": steps})
        results = _measured(how, plan, lpips).results
        full.write_json(args.output / f"{steps}_{window}.json", results)
        found.append(generation_settings.Setting(steps, window, results))
    judged = generation_settings.judge(found)
    print(generation_settings.table(judged))
    answer = generation_settings.answer(judged)
    print(answer or "no setting is good enough to play with")
    if file and answer:
        generation_settings.write(file, answer)
        print(f"→ {file}")


def _settings_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py settings",
        description="Ranks numbers of denoising steps and windows by LPIPS, readable keys and how "
        "long rollouts last, and says which the model should be used with.",
    )
    add = parser.add_argument
    add("--checkpoint", type=path_flag, help="a run, or an export (checkpoints/pocket)")
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--steps", default="1,2,4,10", help="denoising steps a frame (%(default)s)")
    add("--windows", nargs="+", default=["hop"], choices=sampler.WINDOWS, help="(hop)")
    add(
        "--data",
        type=path_flag,
        default=_EMBEDDED,
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
    add("--write", action="store_true", help="put the answer into the model's safetensors file")
    return parser


def close_the_loop(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate.py closed-loop",
        description="Plays the real game (Procgen) and the model under the same keys, and films "
        "both with PSNR over time.",
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
    _add_drawing_flags(add)
    args = parser.parse_args(words)
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
    video.write_video(args.output, closed_loop.film(loop), fps=FPS)
    psnr = bootstrap.of_mean(rollout_quality.capped(loop.scores.psnr).mean(1))
    print(
        f"{len(loop.levels)} of {args.levels} levels lasted {args.frames} frames\n"
        f"PSNR {psnr} dB (mean over frames and levels) → {args.output}"
    )


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = full.Plan()
    _add_drawing_flags(add)
    add(
        "--data",
        type=path_flag,
        default=_EMBEDDED,
        help="folder with train/, val/, test/ (the embedded one)",
    )
    add("--output", type=path_flag, default=Path("metrics.json"), help="(%(default)s)")
    add("--report", type=path_flag, help="folder of report.html (beside the output, OUTPUT_report)")
    add("--split", default=default.split, choices=shards.SPLITS, help="(%(default)s)")
    add("--clips", type=int, default=default.clips, help="0: all that are long enough (0)")
    add("--horizon", type=int, default=default.horizon, help="frames to draw (%(default)s)")
    add("--n-prompt", default="1,4", help="real frames to start from (%(default)s)")
    add("--drift-frames", type=int, default=default.drift_frames, help="(%(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="clips at once (%(default)s)")
    add("--probes", type=path_flag, help="folder where trained probes are kept (~/.cache/cwm_jax)")
    return parser


def _add_drawing_flags(add) -> None:
    add("--checkpoint", type=path_flag, help="a run, or an export (checkpoints/pocket)")
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--ddim-steps", type=int, default=10, help="denoising steps a frame, 1…1000 (%(default)s)")
    add("--window", default="exact", choices=sampler.WINDOWS, help="past the window (%(default)s)")
    add("--seed", type=int, default=0, help="of noise and random actions (%(default)s)")


def _open(args: argparse.Namespace) -> formats.Opened:
    levels = sampler.ddim_levels(args.ddim_steps)
    devices.check()
    args.checkpoint = pretrained.unless(args.checkpoint)
    how = dict(levels=levels, window=args.window)
    return formats.open_sampler(args.checkpoint, step=args.step, **how)


def _numbers(text: str, flag: str = "--n-prompt", such_as: str = "1,4") -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text}: wanted whole numbers, such as {such_as}") from None


if __name__ == "__main__":
    main()
