"""The PyTorch original's training step, timed like ours, and its time to generate a frame.

    python -m benchmarks.original --folder DIR --size small --batch 2 --steps 5 --beside

DIR is a checkout of the original, which is not part of this project; needs torch and einops. The
step is the one of its training script: noise, forward pass, loss, gradients, clipping, AdamW; on a
GPU with bfloat16 autocast and `torch.compile`, alternately with the frames on the card already,
which is the number to compare with ours, and with frames copied from pinned memory in the step, as
its script does. With `--beside` our step and its steps alternate on the same CPU cores, so that
other load on the machine affects both equally; each is a separate process, and the inactive one
sleeps. With `--draw 32` a frame is generated after so many, one and sixteen at a time, before the
training steps.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import sizes
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.runtime import process_memory

ON_DEVICE, COPIED = "on the device", "pinned, copied in the step"

_FRAMES = {"original": ON_DEVICE, "original, frames copied": COPIED}  # by name of a measurement

Step = Callable[[], float]  # makes one update and returns its loss
Taken = tuple[float, float]  # seconds, seconds of processors


def stand_in_for_timm() -> None:
    """Installs the two parts of timm that the original imports."""
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


def stand_in_for_write_video() -> None:
    """Adds a name that the original's sampler imports; torchvision lacks it since 0.26.

    No videos are written here.
    """
    if _missing("torchvision"):
        sys.modules["torchvision"] = types.ModuleType("torchvision")
    try:
        io = importlib.import_module("torchvision.io")
    except ImportError:
        io = sys.modules["torchvision.io"] = types.ModuleType("torchvision.io")
        sys.modules["torchvision"].io = io
    if not hasattr(io, "write_video"):
        io.write_video = None


def _missing(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None


def their_modules(folder: Path) -> tuple:
    """The original's network, noise and sampler, imported from its checkout."""
    if not (folder / "model" / "dit.py").is_file():
        raise UserError(f"--folder={folder}: no checkout of the original, model/dit.py is missing")
    sys.path.insert(0, str(folder))
    if _missing("timm"):
        stand_in_for_timm()
    stand_in_for_write_video()
    names = "model.dit", "training.noise_scheduler", "training.rollout_sampler"
    return tuple(map(importlib.import_module, names))


def their_network(dit, size: str, device: str):
    known = sizes.network(size, dtype="float32")
    return dit.DiT(
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


def random_clips(size: str, *, clips: int, frames: int) -> tuple:
    """Frames in 0…1 and one-hot actions."""
    import torch

    known = sizes.network(size, dtype="float32")
    chosen = torch.randint(0, known.num_actions, (clips, frames))
    actions = torch.nn.functional.one_hot(chosen, known.num_actions).float()
    return torch.rand(clips, frames, 3, known.image_size, known.image_size), actions


def their_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Clips(NamedTuple):
    """The data that the original's sampler needs: this, and a length, here 1."""

    clip_len: int


def their_frame(folder: Path, size: str, *, clips: int, context: int) -> Step:
    """One frame of the original for each of `clips` worlds, in ten steps, after `context` frames.

    As its training script generates: the network as it is, under bfloat16 autocast on a GPU.
    """
    import torch

    dit, _, rollout = their_modules(folder)
    device = their_device()
    pixels, actions = random_clips(size, clips=clips, frames=context + 1)
    sampler = rollout.RolloutSampler(
        their_network(dit, size, device).eval(),
        _Clips(clip_len=context + 1),
        device,
        num_frames=context + 1,
        n_prompt_frames=context,
        ddim_steps=10,
    )

    @torch.no_grad()
    def generate() -> float:
        frames = sampler._rollout(pixels.to(device) * 2 - 1, actions.to(device))
        return float(frames[-1].float().mean())

    return generate


def their_steps(
    folder: Path, size: str, *, clips: int, frames: int, compiled: bool
) -> dict[str, Step]:
    """One update of the original on fixed clips, as in its training script.

    By where the clips are: on the device already, or in pinned memory of the host, as in its
    loader. Both update the same network. On a CPU there is one step.
    """
    import torch

    dit, noise, _ = their_modules(folder)
    device = their_device()
    raw = their_network(dit, size, device)
    model = torch.compile(raw) if compiled else raw
    optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / 2000, total_iters=2000
    )
    schedule = noise.NoiseScheduler(1000, device)
    given = random_clips(size, clips=clips, frames=frames)
    places = {ON_DEVICE: [x.to(device) for x in given]}
    if device == "cuda":
        places[COPIED] = [x.pin_memory() for x in given]

    def step(place: str) -> float:
        x0, held = (x.to(device, non_blocking=True) for x in places[place])
        optimizer.zero_grad()
        t = torch.randint(0, 1000, (clips, frames), device=device)
        x, target = schedule.noised_sample_and_velocity_target(x0 * 2 - 1, t, torch.randn_like(x0))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = torch.nn.functional.mse_loss(model(x, t, held), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()  # as in the original, at every step

    return {place: functools.partial(step, place) for place in places}


def their_step(*args, **kwargs) -> Step:
    """The first of `their_steps`."""
    return next(iter(their_steps(*args, **kwargs).values()))


def our_step(size: str, *, clips: int, frames: int) -> Step:
    """One update of ours, with a wait for the result, in float32."""
    import jax

    from benchmarks import train
    from cwm_jax.training import train_step

    network = sizes.network(size, dtype="float32")
    setup = train_step.TrainSetup(network=network, optim=train.OPTIM)
    state = train_step.init_state(network, train.OPTIM, 0)
    batch, key = train.random_batch(clips, frames), jax.random.key(0)

    def step() -> float:
        nonlocal state
        state, metrics = train_step.train_step(state, batch, key, setup)
        return float(metrics["train/loss"])

    return step


def _take(step: Step) -> Taken:
    clock, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - clock, time.process_time() - cpu


class _Child:
    """The step of a process that alternates with others; set only by `_begin`."""

    step: Step


def _begin(make: Callable[[], Step]) -> None:
    process_memory.keep_freed()  # as in train.py; also for the original
    _Child.step = make()


def _take_there() -> Taken:
    return _take(_Child.step)


@contextlib.contextmanager
def in_own_process(make: Callable[[], Step]):
    """A function that makes a step in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(
            _begin, make
        ).result()  # not an initializer, whose errors would not be reported
        yield lambda: process.submit(_take_there).result()


def timed(turns: dict[str, Callable[[], Taken]], count: int) -> dict[str, dict[str, float]]:
    """Seconds, and seconds of processors, of each; they alternate, without the first round."""
    taken: dict[str, list[Taken]] = {name: [] for name in turns}
    for _ in range(count + 1):
        for name, turn in turns.items():
            taken[name].append(turn())
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
    parser.add_argument(
        "--folder", type=path_flag, required=True, help="a checkout of the original"
    )
    parser.add_argument("--size", choices=sizes.ORIGINALS, default="small")
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as on its GPUs")
    parser.add_argument("--beside", action="store_true", help="alternate with our step, on a CPU")
    parser.add_argument("--output", type=path_flag, help="gets the numbers as JSON")
    parser.add_argument("--draw", type=int, default=0, help="generate a frame after so many first")
    args = parser.parse_args()
    found: dict[str, dict[str, float | str]] = {}

    def keep(turns: dict[str, Callable[[], Taken]], **about: object) -> None:
        for name, numbers in timed(turns, args.steps).items():
            found[name] = about | numbers
            found[name] |= {"frames": _FRAMES[name]} if name in _FRAMES else {}
            print(_described(name, numbers), flush=True)
        if args.output:
            args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    shape = dict(clips=args.batch, frames=args.frames)
    asked = dict(size=args.size, compiled=args.compile, **shape)
    with shown_to_user(), contextlib.ExitStack() as stack:
        if absent := [name for name in ("torch", "einops") if _missing(name)]:
            raise UserError(f"the original needs {' and '.join(absent)}, not installed here")
        for clips in (1, 16) if args.draw else ():
            generate = their_frame(args.folder, args.size, clips=clips, context=args.draw)
            keep({f"original, a frame of {clips}": functools.partial(_take, generate)}, clips=clips)
        if args.beside:
            theirs = functools.partial(their_step, args.folder, **asked)
            makers = {"original": theirs, "ours": functools.partial(our_step, args.size, **shape)}
            turns = {n: stack.enter_context(in_own_process(m)) for n, m in makers.items()}
        else:
            steps = their_steps(args.folder, **asked)
            places = {place: name for name, place in _FRAMES.items()}
            turns = {places[place]: functools.partial(_take, step) for place, step in steps.items()}
        keep(turns, clips=args.batch)


def _described(name: str, numbers: dict[str, float]) -> str:
    return (
        f"{name:9} {numbers['step_s']:.4g} s a step (best {numbers['step_best_s']:.4g}; "
        f"{numbers['step_cpu_s']:.4g} s of processors; the first {numbers['first_step_s']:.3g})"
    )


if __name__ == "__main__":
    with shown_to_user():
        main()
