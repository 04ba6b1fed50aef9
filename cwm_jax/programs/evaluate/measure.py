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
from pathlib import Path

import jax

from cwm_jax import shipped
from cwm_jax.checkpoints import pretrained
from cwm_jax.data import shards
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, echo
from cwm_jax.evaluation import (
    comparison,
    full,
    generation,
    i3d_weights,
    lpips_weights,
    protocol,
    video_distance,
)
from cwm_jax.evaluation.lpips import Lpips
from cwm_jax.files import check_writable, path_flag
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.programs.evaluate import flags, outputs
from cwm_jax.runtime import user_cache


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
    plan, videos = _plan(args), _video_plan(args)
    report = None if args.no_report else _report_folder(args)
    check_writable(args.output)
    if report:
        outputs.check_folder(report)
    found = measured(args, plan, lpips_weights.available(), videos)
    results = found.results
    outputs.write_numbers(args.output, results)
    used = results["clips"]
    print(
        f"{used['used']} of {used['records']} records of {args.data}/{args.split} used "
        f"({used['too_short']} have fewer than {plan.frames} frames)\n"
        f"{comparison.table([(args.output.name, results)])}\n"
        f"numbers → {args.output}",
        flush=True,
    )
    if report:
        write_report(report, found, plan)


def _plan(args: argparse.Namespace) -> full.Plan:
    return full.Plan(
        split=args.split,
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=flags.numbers(args.n_prompt),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
        seeds=args.seeds,
        single_step=not args.no_single_step,
    )


def _report_folder(args: argparse.Namespace) -> Path:
    return args.report or args.output.parent / f"{args.output.stem}_report"


def _video_plan(args: argparse.Namespace) -> video_distance.Plan | None:
    """The settings of KVD; None if it is not requested."""
    if not args.kvd:
        return None
    shared = dict(split=args.split, seed=args.seed, batch_size=args.batch_size)
    return video_distance.Plan(clips=args.kvd, force=args.force, **shared)


def measured(
    args: argparse.Namespace,
    plan: full.Plan,
    lpips: Lpips | None,
    videos: video_distance.Plan | None = None,
) -> full.Measured:
    """The measurements of the model that `args` names, with KVD where `videos` has its plan."""
    i3d = i3d_weights.available() if videos else None
    opened = flags.open_model(args)
    config = DataConfig(
        dir=str(args.data),
        clip_len=min(opened.network.max_frames, DataConfig.clip_len),
    )
    found = full.measure(
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
        videos = video_distance.measure(generate, i3d, config, videos, watched=True)
        found.results["videos"] = videos
    found.results["checkpoint"] = dict(
        path=pretrained.shown(args.checkpoint),
        step=opened.step,
        fingerprint=fingerprint(opened.network, opened.params).hex(),
    )
    found.results["code"] = protocol.code_version()
    found.results["device"] = jax.devices()[0].device_kind
    return found


def write_report(folder: Path, measured: full.Measured, plan: full.Plan) -> None:
    """Writes the report and prints where it is. A failure does not affect the numbers."""
    try:
        from cwm_jax.evaluation import html_report  # imports Matplotlib, which reads its settings

        html_report.write(folder, measured, plan)
    except UserError:
        raise
    except Exception as error:
        echo(f"WARNING: no report was written: {type(error).__name__}: {error}")
    else:
        print(f"pictures → {folder / html_report.FILE}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    default = full.Plan()
    flags.add_generation(add)
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
    return made
