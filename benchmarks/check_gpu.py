"""Checks this device's results: `make check-gpu`, two minutes on a GPU.

    python -m benchmarks.check_gpu [--parts original,debug,pocket,small,large] [--clips 1]

The network against the PyTorch original's numbers; generated rollouts against its rollouts; each
kernel against a float32 formula, on random and on extreme numbers; and three updates of each
shipped config's network on random clips, in float32 and bfloat16, against float32 on this machine's
CPU. One line each, `ok` or `FAIL` (`--`: nothing to check); the exit code is 1 if one failed. On a
GPU each part (the original's numbers, or a network) is a process of its own, since Python and the
compiler take most of the time; XLA does not autotune, which changes speed and not results. Needs
jax, flax, optax and numpy, and a checkout. It runs on a CPU too, where kernels are not checked.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import machine, sizes, train
from benchmarks import network as golden
from cwm_jax.diffusion import denoiser
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import attention, dit, kernel_choice, kernel_measure, kernel_trials
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import process_memory
from cwm_jax.sampling import sampler
from cwm_jax.training import train_step
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.train_step import TrainSetup

ROOT = Path(__file__).parents[1]
ORIGINAL = "original"
PARTS = (ORIGINAL, "debug", "pocket", "small", "large")
EXAMPLES = {  # of the configs, if not the default; with one pass of generated context
    "debug": ExampleConfig().changed(
        {
            "noise_levels.top_share": 0.2,
            "context.share": 0.5,
            "context.steps": 1,
            "context.top_share": 0.5,
            "augment.mirror_share": 0.45,
            "loss.middle_weight": 4.0,
        }
    ),
    "pocket": ExampleConfig().changed(
        {
            "noise_levels.top_share": 0.35,
            "context.share": 0.5,
            "context.top_share": 0.5,
            "context.renoised": True,
            "augment.mirror_share": 0.45,
            "loss.middle_weight": 4.0,
        }
    ),
}
UPDATES = 3
# Largest errors, relative to the root mean square: of losses, gradient norms and gradients.
NEAR = {"float32": (1e-4, 1e-3, 5e-3), "bfloat16": (5e-3, 3e-2, 5e-2)}
ROLLOUT_NEAR = 1e-4  # of 1, in float32
ROLLOUTS = (
    *(("rollout_within_window", "exact"), ("rollout_past_window", "exact")),
    *(("rollout_prompt4_ddim5", "cached"), ("rollout_prompt4_ddim5", "hop")),
)
_KEPT = 4096  # compared numbers of each gradient
_SECONDS = 110
_GRACE = 8  # extra seconds in which a process prints its results

Numbers = dict[str, np.ndarray]


class Verdict(NamedTuple):
    right: bool | None  # None: not checked
    text: str

    @property
    def word(self) -> str:
        return {True: "ok", False: "FAIL", None: "--"}[self.right]


Check = Callable[[], Verdict]


def parity(dtype: str) -> Verdict:
    """The network's velocity and loss against the original's."""
    found = golden.parity(dtype, "xla")
    error = f"v off by {found['worst_v']:.2g}, rms {found['rms_v']:.2g} of {found['rms_of_v']:.3g}"
    return Verdict(bool(found["within"]), error)


def rollout(name: str, window: str) -> Verdict:
    """Frames generated from the original's noise against its own."""
    network = golden.config("float32", "xla")
    params = golden.parameters(network)
    arrays = golden.arrays(name)
    levels = sampler.ddim_levels(int(arrays["ddim_steps"]))
    how = sampler.SamplerConfig(levels=levels, window=window)
    given, actions = int(arrays["n_prompt"]), arrays["actions"]

    @jax.jit
    def generate(params, state, actions_FB, noise_FBHWC):
        net = denoiser.bind(network, params)
        tables = sampler.tabulate(net, how)
        step = lambda state, x: sampler.step(net, tables, state, *x, None, how)
        return jax.lax.scan(step, state, (actions_FB, noise_FBHWC))[1]

    state = sampler.Sampler(network, params, how).start(arrays["prompt"], actions[:, :given])
    noise = np.moveaxis(arrays["noise"].astype(np.float32), 1, 0)
    frames = np.asarray(generate(params, state, actions[:, given:].T, noise))
    frames01 = (np.moveaxis(frames, 0, 1).clip(-1, 1) + 1) / 2
    worst = float(np.abs(frames01 - arrays["frames01"][:, given:]).max())
    return Verdict(worst <= ROLLOUT_NEAR, f"pixels off by {worst:.2g} of 1")


def kernel(network: DiTConfig, setting: str, name: str, frames: int) -> Verdict:
    """A kernel's values and gradients against the float32 formula."""
    if not attention.fuses():
        return Verdict(None, "no GPU")
    trials = kernel_trials.trials(network, clips=1, frames=frames)
    trial = next(trial for trial in trials if trial.setting == setting)
    if name not in trial.candidates:
        return Verdict(None, "does not take these shapes")
    errors = kernel_measure.errors(trial, name)
    right = all(errors[check.name] <= check.near for check in trial.checks)
    text = "off by " + ", ".join(f"{error:.2g} on {what}" for what, error in errors.items())
    return Verdict(right, text)


def with_kernels(network: DiTConfig, frames: int) -> DiTConfig:
    """The network with the kernels of this project, if they support its shapes."""
    if not attention.fuses():
        return network
    taken = {
        trial.setting: next((n for n in ("fused", "triton") if n in trial.candidates), "xla")
        for trial in kernel_trials.trials(network, clips=1, frames=frames)
    }
    return dataclasses.replace(network, **taken)


def parameters(network: DiTConfig) -> dit.Params:
    """Random parameters, all of them used, the same on each device."""
    rng = np.random.default_rng(0)
    shapes = sorted(dit.shapes(network).items())
    scale = lambda shape: 0.3 * shape[0] ** -0.5 if len(shape) > 1 else 0.02
    normal = lambda shape: scale(shape) * rng.standard_normal(shape, np.float32)
    return {name: jnp.asarray(normal(x.shape)) for name, x in shapes}


def updates(size: str, network: DiTConfig, clips: int, frames: int) -> Numbers:
    """Losses, gradient norms, and some numbers of the mean gradients, of three updates."""
    state = train_step.init_state(network, train.OPTIM, 0, parameters(network))
    batch, key = train.random_batch(clips, frames), jax.random.key(0)
    of_size = EXAMPLES.get(size, ExampleConfig())
    setup = TrainSetup(network=network, optim=train.OPTIM, examples=of_size)
    losses, norms = [], []
    for _ in range(UPDATES):
        state, metrics = train_step.train_step(state, batch, key, setup)
        losses.append(float(metrics["train/loss"]))
        norms.append(float(metrics["train/grad_norm"]))
    means = optax.tree_utils.tree_get(state.opt_state, "mu")
    some = lambda x: np.asarray(x.reshape(-1)[:: max(1, x.size // _KEPT)])
    gradients = np.concatenate([some(means[name]) for name in sorted(means)])
    return {"losses": np.array(losses), "norms": np.array(norms), "gradients": gradients}


def compare(found: Numbers, wanted: Numbers, dtype: str) -> Verdict:
    errors = [
        float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]))
        for name in ("losses", "norms", "gradients")
    ]
    right = all(error <= near for error, near in zip(errors, NEAR[dtype], strict=True))
    text = f"losses off by {errors[0]:.2g}, gradient norms {errors[1]:.2g}, gradients "
    return Verdict(right, text + f"{errors[2]:.2g}")


class References:
    """The updates of a network on this machine's CPU, computed by a process of its own."""

    def __init__(self, folder: Path, network: str, clips: int, frames: int):
        self._folder = folder
        words = f"--parts {network} --clips {clips} --frames {frames} --reference"
        self._log = (folder / "log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.check_gpu", *words.split(), str(folder)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def of(self, size: str) -> Numbers:
        """Waits for the updates."""
        path = self._folder / f"{size}.npz"
        while not path.exists():
            ended = self.process.poll() is not None
            if ended and not path.exists():
                output = (
                    (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip()
                )
                raise RuntimeError(f"no numbers of the CPU: {output.splitlines()[-1:]}")
            time.sleep(0.1)
        with np.load(path) as file:
            return {name: file[name] for name in file.files}


def write_references(folder: Path, size: str, clips: int, frames: int) -> None:
    network = sizes.network(size, dtype="float32")
    found = updates(size, network, clips, frames or network.max_frames)
    np.savez(folder / f"{size}.part.npz", **found)
    (folder / f"{size}.part.npz").rename(folder / f"{size}.npz")


def step(references: References, size: str, dtype: str, clips: int, frames: int) -> Verdict:
    network = with_kernels(sizes.network(size, dtype=dtype), frames)
    found = updates(size, network, clips, frames)
    verdict = compare(found, references.of(size), dtype)
    used = ", ".join(map(" ".join, kernel_choice.settings(network).items()))
    return verdict._replace(text=f"{verdict.text}; {used}")


def original_checks() -> Iterator[tuple[str, Check]]:
    """Lines of the part that compares with the original's numbers."""
    for dtype in ("float32", "bfloat16"):
        yield f"parity in {dtype}", functools.partial(parity, dtype)
    for name, window in ROLLOUTS:
        yield f"{name}, {window}", functools.partial(rollout, name, window)


def network_checks(
    references: References, size: str, clips: int, frames: int
) -> Iterator[tuple[str, Check]]:
    """Lines of a network's part."""
    network = sizes.network(size, dtype="bfloat16")
    length = frames or network.max_frames
    for dtype in ("float32", "bfloat16"):  # first, as they take longest to compile
        check = functools.partial(step, references, size, dtype, clips, length)
        yield f"{UPDATES} updates of {size} in {dtype}", check
    for setting, names in kernel_choice.KERNELS.items():
        for name in names:
            check = functools.partial(kernel, network, setting, name, length)
            yield f"{setting} {name} at {size}", check


def run(asked: list[tuple[str, Check]], seconds: float | None) -> bool:
    """Prints a line for each check when it is done; whether none failed."""
    # Compiling takes most of the time, so it runs in parallel on the machine's cores.
    pool = futures.ThreadPoolExecutor(8 if jax.default_backend() == "gpu" else 1)
    end = None if seconds is None else time.monotonic() + seconds
    running = [(name, pool.submit(check)) for name, check in asked]
    failed = 0
    for name, future in running:
        try:
            left = None if end is None else max(0.0, end - time.monotonic())
            verdict = future.result(left)
        except futures.TimeoutError:
            verdict = Verdict(False, f"not done within {seconds:g} s")
        except Exception as error:  # one failed check must not hide the others
            verdict = Verdict(False, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        failed += verdict.right is False
        print(f"{verdict.word:4}  {name}: {verdict.text}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(running) - failed} of {len(running)} lines without a failure", flush=True)
    return not failed


def run_part(part: str, clips: int, frames: int, seconds: float | None) -> bool:
    """A part in this process; whether no line failed."""
    if part == ORIGINAL:
        return run(list(original_checks()), seconds)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        references = References(Path(folder), part, clips, frames)
        stack.callback(references.process.wait)
        stack.callback(references.process.kill)
        return run(list(network_checks(references, part, clips, frames)), seconds)


def run_processes(commands: dict[str, list[str]], seconds: float) -> bool:
    """Runs the commands of all parts in parallel and prints their output, part by part.

    A part that exceeds the time is killed. Returns whether all ended with code 0.
    """
    end = time.monotonic() + seconds
    whole = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE)
    started = {part: subprocess.Popen(command, **whole) for part, command in commands.items()}
    well = True
    for part, process in started.items():
        try:
            output, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        print(output, end="", flush=True)
        if process.returncode not in (0, 1):
            print(f"FAIL  {part}: ended with code {process.returncode}", flush=True)
        well &= process.returncode == 0
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="networks, and the original's")
    parser.add_argument("--clips", type=int, default=1, help="of an update")
    parser.add_argument("--frames", type=int, default=0, help="of a clip; 0: the whole window")
    parser.add_argument("--seconds", type=float, help=f"for all; on a GPU {_SECONDS} by default")
    parser.add_argument("--reference", type=path_flag, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [name for name in parts if name not in (ORIGINAL, *sizes.SIZES)]:
        known = ", ".join((ORIGINAL, *sizes.SIZES))
        parser.error(f"--parts: {unknown[0]} is none of {known}")
    if args.reference:
        write_references(args.reference, parts[0], args.clips, args.frames)
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it
    process_memory.skip_autotuning()
    on_gpu = jax.default_backend() == "gpu"
    seconds = args.seconds or (_SECONDS if on_gpu else None)
    if not on_gpu or len(parts) == 1:
        well = [run_part(part, args.clips, args.frames, seconds) for part in parts]
        return 0 if all(well) else 1
    print(json.dumps(machine.description()), flush=True)
    words = [sys.executable, "-u", "-m", "benchmarks.check_gpu"]
    words += ["--clips", str(args.clips), "--frames", str(args.frames), "--seconds", str(seconds)]
    commands = {part: [*words, "--parts", part] for part in parts}
    return 0 if run_processes(commands, seconds + _GRACE) else 1


if __name__ == "__main__":
    with shown_to_user():
        code = main()
    os._exit(code)  # does not wait for unfinished parts
