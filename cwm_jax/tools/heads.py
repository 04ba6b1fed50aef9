"""Adds heads for rewards and ends of episodes to a trained model; its frames do not change.

    python -m cwm_jax.tools.collect --output data/mine --policy random=1,sticky=4 --min-chunk 12
    python -m cwm_jax.tools.heads checkpoints/pocket --data data/mine --output heads.safetensors
    python evaluate.py outcomes --checkpoint heads.safetensors --data data/mine

The network is not trained: heads are fitted to the features of its blocks on recorded frames. Their
probabilities are then shifted so that 0.5 is the threshold of best F1 for events of the validation
split. Training with config.model.heads=True needs no such step.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from cwm_jax.checkpoints import formats, weights
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.evaluation import outcomes
from cwm_jax.files import model_flag, path_flag
from cwm_jax.runtime import devices
from cwm_jax.sampling import sampler
from cwm_jax.training import frozen_heads


def add_heads(
    trained: Trained, folder: Path, *, frames: int, epochs: int, val_records: int, seed: int
) -> Trained:
    """The model with heads fitted on the train split of a data folder.

    Raises:
        UserError: the folder has no rewards, or its records are shorter than the model's window.
    """
    network = dataclasses.replace(trained.network, heads=True)
    window = network.max_frames
    config = DataConfig(dir=str(folder))
    settings = dict(num_actions=network.action_values, outcomes=True)
    episodes = splits.open_episodes(config, "train", **settings)
    if episodes.lengths.max() < window:
        raise UserError(
            f"{folder}/train: its longest record has {episodes.lengths.max()} frames; this model "
            f"needs {window}, its window"
        )
    how = dict(seed=seed, watched=True)
    seen = frozen_heads.look(trained.network, trained.params, episodes, frames=frames, **how)
    params = frozen_heads.fit(network, trained.params, seen, epochs=epochs, **how)
    held_out = splits.open_episodes(config, "val", **settings)
    count = min(val_records, int((held_out.lengths >= window).sum()))
    numbers = splits.pick_episodes(held_out, count=count, length=window, seed=seed)
    predicted = outcomes.of_records(network, params, held_out, numbers)
    best = {head: outcomes.best_threshold(predicted, head) for head in outcomes.HEADS}
    print(f"thresholds of best F1 on {count} validation records, shifted to 0.5: {best}")
    model = dict(trained.config["model"]) | {"heads": True}
    return trained._replace(
        network=network,
        params=frozen_heads.shifted(params, **best),
        config=trained.config | {"model": model},
    )


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        for flag in ("frames", "epochs", "val_records"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be 1 or more")
        sampler.check_seed(args.seed)
        if args.output.suffix != weights.SUFFIX:
            raise UserError(f"--output {args.output}: must end in {weights.SUFFIX}")
        devices.check()
        trained = formats.load(args.checkpoint, step=args.step)
        names = ("frames", "epochs", "val_records", "seed")
        fitted = add_heads(trained, args.data, **{name: getattr(args, name) for name in names})
        params = jax.tree.map(lambda x: x.astype(args.dtype), fitted.params)
        weights.write(
            args.output, params, {"format": 1, "step": fitted.step, "config": fitted.config}
        )
        print(f"{args.checkpoint} with heads → {args.output}")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("checkpoint", type=model_flag, help="a run, one checkpoint of it, an export, or hf://…")
    add("--data", type=path_flag, required=True, help="data folder with rewards (tools.collect)")
    add("--output", type=path_flag, required=True, help="file.safetensors to make")
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--frames", type=int, default=20_000, help="of the train split, to fit (%(default)s)")
    add("--epochs", type=int, default=20, help="over these frames (%(default)s)")
    add("--val-records", type=int, default=150, help="to choose thresholds (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    return flags


if __name__ == "__main__":
    main()
