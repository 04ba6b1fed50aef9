"""Differences of `cached`, `hop` and bfloat16 from `exact`, with the same noise.

    python -m benchmarks.windows --checkpoint runs/demo --json windows.json

Rollouts start from one real frame and its true actions, followed by random ones after the record's
end. Two distances: of a frame from that of `exact` in float32 (PSNR, dB; the windows are equal
until they slide), and of each from the real frame, as long as there is one.
"""

import argparse
import dataclasses
import json

import jax
import numpy as np

from benchmarks import machine
from cwm_jax.checkpoints import formats, run_checkpoint
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import shown_to_user
from cwm_jax.files import model_flag, path_flag
from cwm_jax.sampling import sampler

WAYS = {  # window, dtype of the matmuls
    "exact": ("exact", "float32"),
    "cached": ("cached", "float32"),
    "hop": ("hop", "float32"),
    "bfloat16": ("exact", "bfloat16"),
}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over clips of the PSNR of uint8 frames [B, H, W, C], in dB; equal frames count 99."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3)) / 255**2
    return float(-10 * np.log10(np.maximum(error, 10**-9.9)).mean())


def rollouts(trained: run_checkpoint.Trained, prompt, led_in, actions, *, steps: int, seed: int):
    """Frames of each way, uint8 [B, F, H, W, C] by name."""
    generated = {}
    for name, (window, dtype) in WAYS.items():
        config = sampler.SamplerConfig(levels=sampler.ddim_levels(steps), window=window)
        network = dataclasses.replace(trained.network, dtype=dtype)
        generator = sampler.Sampler(network, trained.params, config)
        state = generator.start(prompt, led_in)
        generated[name] = np.asarray(generator.rollout(state, actions, jax.random.key(seed))[1])
    return generated


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=model_flag, required=True)
    add("--data", type=path_flag, default="assets/coinrun", help="(%(default)s)")
    add("--clips", type=int, default=8, help="records of 160 frames (%(default)s)")
    add("--frames", type=int, default=256, help="generated after the first (%(default)s)")
    add("--ddim-steps", type=int, default=10, help="(%(default)s)")
    add("--seed", type=int, default=0)
    add("--json", type=path_flag)
    args = parser.parse_args()

    trained = formats.load(args.checkpoint)
    episodes = splits.open_episodes(DataConfig(dir=str(args.data)), "test")
    numbers = splits.pick_episodes(episodes, count=args.clips, length=160, seed=args.seed)
    clips = splits.load_clips(episodes, numbers, length=160)
    real, taken = clips["frames"], clips["actions"]
    rng = np.random.default_rng(args.seed)
    more = rng.integers(trained.network.num_actions, size=(args.clips, max(args.frames - 159, 0)))
    actions = np.concatenate([taken[:, 1:], more], axis=1)[:, : args.frames]
    generated = rollouts(
        trained, real[:, :1], taken[:, :1], actions, steps=args.ddim_steps, seed=args.seed
    )
    window, rows = trained.network.max_frames, []
    for frame in sorted({1, window - 1, window, 32, 64, 128, 159, args.frames}):
        if frame > args.frames:
            continue
        row = {"frame": frame + 1}
        row |= {
            f"{way} ~ exact": psnr(generated[way][:, frame - 1], generated["exact"][:, frame - 1])
            for way in list(WAYS)[1:]
        }
        in_record = frame < real.shape[1]
        row |= {
            f"{way} ~ real": psnr(generated[way][:, frame - 1], real[:, frame])
            if in_record
            else "–"
            for way in WAYS
        }
        rows.append(row)
    print(machine.description() | {"checkpoint step": trained.step, "window": window})
    print(machine.table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with shown_to_user():
        main()
