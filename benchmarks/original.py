"""The PyTorch original's training step, timed like ours.

    python -m benchmarks.original --folder DIR --size small --batch 2 --steps 5 --beside

DIR is a checkout of the original, of which nothing is kept here; needs torch and einops. The step
is the one of its training script: noise, forward pass, loss, gradients, clipping, AdamW; on a GPU
with bfloat16 autocast and `torch.compile`. With `--beside` our step takes its turn after each of
its steps, on the same CPU cores, so that whatever else the machine does meets both alike.
"""

import argparse
import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import sizes
from cwm_jax.errors import UserError, shown_to_user

Step = Callable[[], float]  # takes one update and tells its loss


def stand_in_for_timm() -> None:
    """Puts the two pieces of timm that the original borrows where it looks for them."""
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self, in_features: int, hidden_features: int, act_layer, drop: float):
            super().__init__()
            self.fc1 = nn.Linear(in_features, hidden_features)
            self.act = act_layer()
            self.fc2 = nn.Linear(hidden_features, in_features)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    pieces = {
        "timm": {},
        "timm.models": {},
        "timm.models.vision_transformer": {"Mlp": Mlp},
        "timm.layers": {},
        "timm.layers.helpers": {"to_2tuple": lambda x: (x, x)},
    }
    for name, content in pieces.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)


def their_modules(folder: Path) -> tuple:
    """The original's network and noise, imported from its checkout."""
    if not (folder / "model" / "dit.py").is_file():
        raise UserError(f"--folder={folder}: no checkout of the original, model/dit.py is missing")
    sys.path.insert(0, str(folder))
    if importlib.util.find_spec("timm") is None:
        stand_in_for_timm()
    return importlib.import_module("model.dit"), importlib.import_module("training.noise_scheduler")


def their_step(folder: Path, size: str, *, clips: int, frames: int, compiled: bool) -> Step:
    """One update of the original on clips that stay the same, as its training script makes it."""
    import torch

    dit, noise = their_modules(folder)
    known = sizes.network(size, dtype="float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = dit.DiT(
        input_h=known.image_size,
        input_w=known.image_size,
        patch_size=known.patch_size,
        in_channels=3,
        hidden_size=known.hidden_size,
        depth=known.depth,
        num_heads=known.num_heads,
        external_cond_dim=known.num_actions,
        max_frames=known.max_frames,
    ).to(device)
    model = torch.compile(raw) if compiled else raw
    optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / 2000, total_iters=2000
    )
    schedule = noise.NoiseScheduler(1000, device)
    pixels = torch.rand(clips, frames, 3, known.image_size, known.image_size)
    chosen = torch.randint(0, known.num_actions, (clips, frames))
    actions = torch.nn.functional.one_hot(chosen, known.num_actions).float()

    def step() -> float:
        x0, held = pixels.to(device), actions.to(device)
        optimizer.zero_grad()
        t = torch.randint(0, 1000, (clips, frames), device=device)
        x, target = schedule.noised_sample_and_velocity_target(x0 * 2 - 1, t, torch.randn_like(x0))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = torch.nn.functional.mse_loss(model(x, t, held), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()  # so does the original, at every step

    return step


def our_step(size: str, *, clips: int, frames: int) -> Step:
    """One update of ours, waited for, in float32."""
    import jax

    from benchmarks import train
    from cwm_jax import training

    network = sizes.network(size, dtype="float32")
    state = training.init_state(network, train.OPTIM, 0)
    batch, key = train.random_batch(clips, frames), jax.random.key(0)

    def step() -> float:
        nonlocal state
        state, metrics = training.train_step(state, batch, key, network=network, optim=train.OPTIM)
        return float(metrics["train/loss"])

    return step


def timed(steps: dict[str, Step], count: int) -> dict[str, dict[str, float]]:
    """Seconds, and seconds of processors, of each; they take turns, the first turn not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(count + 1):
        for name, step in steps.items():
            clock, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    counted = {name: np.array(pairs[1:]) for name, pairs in taken.items()}
    return {
        name: {
            "step_s": float(np.median(pairs[:, 0])),
            "step_best_s": float(pairs[:, 0].min()),
            "step_cpu_s": float(np.median(pairs[:, 1])),
            "first_step_s": taken[name][0][0],
        }
        for name, pairs in counted.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a checkout of the original")
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as on its GPUs")
    parser.add_argument("--beside", action="store_true", help="our step in turn with it, on a CPU")
    parser.add_argument("--output", type=Path, help="gets the numbers as JSON")
    args = parser.parse_args()
    shape = dict(clips=args.batch, frames=args.frames)
    with shown_to_user():
        steps = {"original": their_step(args.folder, args.size, compiled=args.compile, **shape)}
        if args.beside:
            steps["ours"] = our_step(args.size, **shape)
        found = timed(steps, args.steps)
    for name, numbers in found.items():
        print(
            f"{name:9} {numbers['step_s']:.4g} s a step (best {numbers['step_best_s']:.4g}; "
            f"{numbers['step_cpu_s']:.4g} s of processors; the first {numbers['first_step_s']:.3g})"
        )
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
