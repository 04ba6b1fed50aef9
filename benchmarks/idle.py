"""How much a generated world changes while no key is pressed, where the game stands still.

    python -m benchmarks.idle --data data/pocket-eval --ddim-steps 1,2,4

From four real frames of test levels, 120 frames are generated without a key; frame 120 is compared
with frame 20, by which time falling players have landed. Prints the mean and the median over clips
of LPIPS (if its weights are here) and of the root mean square difference in colours of 0…255.
"""

import argparse

import numpy as np

from benchmarks import held_keys, machine
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.coinrun import NOOP
from cwm_jax.errors import shown_to_user
from cwm_jax.evaluation import lpips, lpips_weights
from cwm_jax.files import model_flag, path_flag

SETTLED, FRAMES = 20, 120


def changes(frames_BFHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Distances of the last frame from that after `SETTLED`, by clip."""
    before, after = frames_BFHWC[:, SETTLED - 1], frames_BFHWC[:, -1]
    squares = np.square(after.astype(np.float32) - before)
    found = {"colours": np.sqrt(squares.mean((1, 2, 3)))}
    if weights := lpips_weights.available():
        found["lpips"] = lpips.distances(weights, before, after)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    whole = lambda text: [int(word) for word in text.split(",")]
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help="a run, or an export (checkpoints/pocket)")
    add("--data", type=path_flag, default="assets/coinrun", help="(%(default)s)")
    add("--clips", type=int, default=24, help="(%(default)s)")
    add("--ddim-steps", type=whole, default=[2], help="denoising steps, with commas between (2)")
    with shown_to_user():
        args = parser.parse_args()
        path, rows = pretrained.unless(args.checkpoint), []
        actions = np.full((args.clips, FRAMES), NOOP, np.int32)
        for steps in args.ddim_steps:
            levels = formats.ddim_levels(steps)
            opened = formats.open_sampler(path, window="hop", levels=levels)
            _, frames = held_keys.rollouts(opened, args.data, actions, seed=0)
            row = {"S": steps, "still_threshold": opened.network.still_threshold}
            for name, values in changes(frames).items():
                row |= {f"{name}, mean": values.mean(), f"{name}, median": np.median(values)}
            rows.append(row)
        print(machine.table(rows))


if __name__ == "__main__":
    main()
