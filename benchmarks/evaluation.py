"""The cost of evaluation, and the evaluators' results on real frames with known answers.

    python -m benchmarks.evaluation --size debug --clips 2 --frames 8 --every 400

Embedded data. `--clips` and `--frames` are those of a training batch, `--every` the steps from one
quick form to the next.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import machine, sizes, train
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import shown_to_user
from cwm_jax.evaluation import (
    drift,
    generation,
    held_out,
    probe,
    probe_accuracy,
    quick,
    rollout_quality,
)
from cwm_jax.evaluation.frame_scores import score
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling.sampler import Sampler, SamplerConfig
from cwm_jax.training.config import ComputeConfig

_DATA = DataConfig(dir=str(Path(__file__).parents[1] / "assets" / "coinrun"))


def quick_form(network: DiTConfig, *, clips: int, frames: int, every: int) -> dict[str, float]:
    """Seconds of the quick form, as `configs/debug.py` sets it, and of training."""
    few = quick.prepare(_DATA, "val", clips=4, frames=8, num_actions=15, seed=0)
    generate = generation.by_sampler(Sampler(network, dit.init(network, 0), SamplerConfig()))
    first, again = (_seconds(lambda: dict(quick.run(generate, few))) for _ in range(2))
    shape = dict(clips=clips, frames=frames, step=ComputeConfig())
    step = train.measure(network, **shape)["step_s"]
    share = again / (again + every * step)
    return {"first_s": first, "again_s": again, "step_s": step, "share": share}


def real_frames() -> dict[str, float | dict]:
    """Results on the real test clips: the probe, the floor, and drift."""
    learnt = held_out.load(_DATA, "train", frames=160)
    start = time.perf_counter()
    reader = probe.train(learnt.frames, learnt.actions)
    train_s = time.perf_counter() - start
    clips = held_out.load(_DATA, "test", frames=124, up_to=drift.REAL)
    read = probe_accuracy.summary(reader, clips.frames, clips.frames, clips.actions)
    copied = rollout_quality.copy_last(clips.frames[:, :1], 120)
    floor = score(copied, clips.frames[:, 1:121], clips.frames[:, 0])
    horizons = (1, 10, 120)
    lasted = {name: drift.summary(x, clips.frames) for name, x in ruined(clips.frames[:, :80])}
    return {
        "clips": len(clips),
        "probe_train_s": train_s,
        **{side: {k: read[side][k] for k in _REPORTED} for side in ("real", "shuffled")},
        "copy_last_psnr": rollout_quality.summary(floor, horizons)["psnr"]["mean"],
        "false_alarms": lasted["real"]["false_alarms"],
        "collapse": {name: found["frames_to_collapse"]["mean"] for name, found in lasted.items()},
        "survived": {name: found["survived"] for name, found in lasted.items()},
    }


_REPORTED = ("accuracy", "balanced", "keys")


def ruined(frames_BTHWC: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Real frames, and the same degraded in several ways from the first on."""
    yield "real", frames_BTHWC
    values = frames_BTHWC.astype(np.float32)
    noise = np.random.default_rng(0).normal(scale=20, size=values.shape)
    yield "noise, σ = 20 of 255", (values + noise).clip(0, 255).astype(np.uint8)
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    blurred = np.mean([np.roll(values, shift, axis=(2, 3)) for shift in shifts], axis=0)
    yield "blur, 3 × 3", blurred.astype(np.uint8)
    yield "flat grey", np.full_like(frames_BTHWC, 128)
    yield "darker by 30 %", (0.7 * values).astype(np.uint8)


def _seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="debug", choices=sizes.SIZES)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--every", type=int, default=400)
    args = parser.parse_args()
    shape = dict(clips=args.clips, frames=args.frames, every=args.every)
    found = {
        **machine.description(),
        "quick_form": quick_form(sizes.network(args.size), **shape),
        **real_frames(),
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    with shown_to_user():
        main()
