"""`evaluate.py outcomes`: how well a model's heads predict rewards and ends of episodes."""

import argparse
from pathlib import Path

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.data import shards, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.evaluation import full, held_out, outcomes, protocol
from cwm_jax.files import model_flag, path_flag
from cwm_jax.programs.evaluate import flags
from cwm_jax.sampling import sampler
from cwm_jax.sampling.worlds import WorldGenerator


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
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


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called("outcomes"),
        description="How well a model's heads predict rewards and ends of episodes, on real "
        "and on generated frames.",
    )
    add = made.add_argument
    add("--checkpoint", type=model_flag, help=flags.CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--data", type=path_flag, required=True, help="folder with rewards (tools.collect)")
    add("--split", default="test", choices=shards.SPLITS, help="(%(default)s)")
    add("--records", type=int, default=0, help="0: all that are long enough (0)")
    add("--ahead", type=int, default=16, help="frames of a rollout; 0: none (%(default)s)")
    add("--ddim-steps", type=int, help="denoising steps of rollouts (the model's own)")
    add("--seed", type=int, default=0, help="of records, places and noise (%(default)s)")
    add("--output", type=path_flag, default=Path("outcomes.json"), help="(%(default)s)")
    return made
