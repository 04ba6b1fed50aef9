"""`evaluate.py outcomes`: how well a model's heads predict rewards and ends of episodes."""

import argparse
from pathlib import Path

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.data import shards, splits
from cwm_jax.data.clips import Episodes
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import held_out, outcomes
from cwm_jax.files import check_writable, path_flag
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.programs.evaluate import flags, outputs
from cwm_jax.runtime import devices
from cwm_jax.sampling import sampler
from cwm_jax.sampling.worlds import WorldGenerator


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
    _check(args)
    trained = formats.load(pretrained.unless(args.checkpoint), step=args.step)
    outcomes.check(trained.network, trained.path)
    levels = sampler.ddim_levels(args.ddim_steps or formats.usual_steps(trained))
    episodes, numbers = _records(args, length=trained.network.max_frames)
    predicted = outcomes.of_records(trained.network, trained.params, episodes, numbers)
    results = {"real_frames": outcomes.summary(predicted)}
    _print(f"real frames of {len(predicted)} records", results["real_frames"])
    conditions = {"records": len(numbers), "split": args.split, "ahead": args.ahead}
    if args.ahead:
        how = sampler.SamplerConfig(levels=levels)
        generator = WorldGenerator(trained.network, trained.params, how)
        predicted = outcomes.of_rollouts(
            generator, episodes, numbers, ahead=args.ahead, seed=args.seed
        )
        results["rollouts"] = outcomes.summary(predicted)
        _print(f"{len(predicted)} rollouts of {args.ahead} frames", results["rollouts"])
        conditions["levels"] = levels
    conditions |= {
        "seed": args.seed,
        "fingerprint": fingerprint(trained.network, trained.params).hex(),
    }
    outputs.write_numbers(args.output, results | {"conditions": conditions})
    print(f"numbers → {args.output}")


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for invalid flags before a model is opened."""
    sampler.check_seed(args.seed)
    for flag, zero in (("records", "all that are long enough"), ("ahead", "no rollouts")):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be 0 ({zero}) or more")
    if args.ddim_steps is not None:
        sampler.ddim_levels(args.ddim_steps)
    check_writable(args.output)
    devices.check()


def _records(args: argparse.Namespace, *, length: int) -> tuple[Episodes, list[int]]:
    """The split, and the numbers of its records that are measured."""
    config = DataConfig(dir=str(args.data))
    episodes = splits.open_episodes(config, args.split, outcomes=True)
    eligible = held_out.long_enough(episodes, config, args.split, frames=length)
    count = args.records or len(eligible)
    return episodes, splits.pick_episodes(episodes, count=count, length=length, seed=args.seed)


def _print(title: str, results: dict) -> None:
    print(outcomes.table(title, results), flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called("outcomes"),
        description="How well a model's heads predict rewards and ends of episodes, on real "
        "and on generated frames.",
    )
    add = made.add_argument
    flags.add_model(add)
    add("--data", type=path_flag, required=True, help="folder with rewards (tools.collect)")
    add("--split", default="test", choices=shards.SPLITS, help="(%(default)s)")
    add("--records", type=int, default=0, help="0: all that are long enough (0)")
    add("--ahead", type=int, default=16, help="frames of a rollout; 0: none (%(default)s)")
    add("--ddim-steps", type=int, help="denoising steps of rollouts (the model's own)")
    add("--seed", type=int, default=0, help="of records, places and noise (%(default)s)")
    add("--output", type=path_flag, default=Path("outcomes.json"), help="(%(default)s)")
    return made
