"""Everything that a GPU should be asked, within a time limit: `make bench-gpu`.

    python -m benchmarks.gpu --minutes 7.5 --output runs/bench-gpu

Golden parity in float32 and bfloat16, variants of attention, variants of the training step, and the
sampler, in this order of worth; what the time no longer allows is named as skipped. Each result is
printed and saved when it is there. Needs jax, flax, optax, orbax-checkpoint and numpy, and a
checkout; `--size tiny` tries it on a CPU.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import sizes, train
from cwm_jax import attention, compile_cache, diffusion, model, speed, torch_format
from cwm_jax.coinrun import to_model
from cwm_jax.model import DiTConfig
from cwm_jax.training import StepConfig

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

Result = dict[str, object]


def parity(dtype: str, kernel: str) -> Result:
    """Largest difference of a velocity, and of the loss, from what the original computed."""
    told = json.loads((GOLDEN / "model.json").read_text())
    names = "patch_size", "hidden_size", "depth", "num_heads", "num_actions", "max_frames"
    config = DiTConfig(
        **{name: told[name] for name in names},
        image_size=told["input_size"],
        dtype=dtype,
        attention=kernel,
    )
    with np.load(GOLDEN / "forward.npz") as file:
        golden = {name: file[name] for name in file.files}
    with np.load(GOLDEN / "weights_step0.npz") as file:
        params = torch_format.from_original({n: file[n] for n in file.files}, config)
    noise = golden["noise"].astype(np.float32)
    sample = diffusion.noised(to_model(golden["frames"]), golden["t"], noise)
    network = jax.jit(lambda params, *args: model.bind(config, params)(*args))
    v = np.asarray(network(params, sample.x, golden["t"], golden["actions"]))
    return {
        "dtype": dtype,
        "attention": kernel,
        "worst_v": float(np.abs(v - golden["v_pred"]).max()),
        "rms_v": float(np.sqrt(np.square(v - golden["v_pred"]).mean())),
        "rms_of_v": float(np.sqrt(np.square(golden["v_pred"]).mean())),
        "loss_off": abs(float(diffusion.loss(v, sample.velocity)) - float(golden["loss"])),
    }


def attention_time(network: DiTConfig, kernel: str, over: str, *, clips: int) -> Result:
    """Seconds of one attention, forward and with its gradients, over clips of 32 frames."""
    shape = clips, 32, network.tokens, network.num_heads, network.head_size
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, shape, network.compute_dtype) for key in keys)
    function = attention.over_space if over == "space" else attention.over_time
    forward = jax.jit(lambda q, k, v: function(q, k, v, implementation=kernel))
    both = jax.jit(lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g))
    one = q.nbytes
    times = speed.best_time(forward, q, k, v), speed.best_time(both, q, k, v, g)
    return {
        "attention": kernel,
        "over": over,
        "forward_s": times[0],
        "forward_and_back_s": times[1],
        "forward_gb_s": 4 * one / times[0] / 1e9,  # q, k, v in, one out: the least there is
    }


def sections(size: str, clips: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Names and measurements, the most wanted first."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    network = lambda kernel: sizes.network(size, dtype=dtype, attention=kernel)
    kernels = ("xla", "cudnn") if on_gpu else ("xla",)
    machine: dict[str, float] = {}

    def measure_machine() -> Result:
        machine.update(train.machine_speed(network("xla").compute_dtype))
        return machine | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def step_time(kernel: str, remat: str, parts: int) -> Result:
        how = StepConfig(remat=remat, accumulate_steps=parts)
        return train.measure(network(kernel), clips=clips, step=how, steps=10, machine=machine)

    yield "machine", measure_machine
    yield "parity float32", lambda: parity("float32", "xla")
    for kernel in kernels:
        yield f"parity bfloat16 {kernel}", lambda kernel=kernel: parity("bfloat16", kernel)
    for over in ("space", "time"):
        for kernel in kernels:
            measure = lambda over=over, kernel=kernel: attention_time(
                network(kernel), kernel, over, clips=clips
            )
            yield f"attention over {over} {kernel}", measure
    variants = [(kernels[-1], "gelu_norm", 1), (kernels[-1], "none", 1), (kernels[0], "none", 1)]
    variants += [(kernels[-1], "layer", 1), (kernels[-1], "none", 4)]
    for variant in dict.fromkeys(variants):
        name = f"step {variant[0]} remat={variant[1]} parts={variant[2]}"
        yield name, lambda variant=variant: step_time(*variant)


def sampler(seconds: float, output: Path) -> Result:
    """Runs `benchmarks.sample` as a program of its own, in what time is left."""
    if importlib.util.find_spec("benchmarks.sample") is None:
        return {"skipped": "there is no benchmarks/sample.py"}
    command = [sys.executable, "-m", "benchmarks.sample"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        return {"unfinished": (late.stdout or b"").decode()}
    return {"rc": done.returncode, "told": done.stdout, "errors": done.stderr[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128, help="clips a step")
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing new after")
    parser.add_argument("--sampler-minutes", type=float, default=2.0, help="kept for the sampler")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu"))
    args = parser.parse_args()
    compile_cache.enable()
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    left = lambda: 60 * args.minutes - (time.monotonic() - start)
    results: dict[str, Result] = {}
    slowest = 0.0
    for name, measure in sections(args.size, args.batch):
        begun = time.monotonic()
        if left() - 60 * args.sampler_minutes < slowest:
            results[name] = {"skipped": "no time left"}
        else:
            results[name] = _tried(measure)
            slowest = max(slowest, time.monotonic() - begun)
        _keep(name, results, args.output)
    results["sampler"] = sampler(max(left(), 1), args.output)
    _keep("sampler", results, args.output)
    print(f"all numbers are in {args.output / 'results.json'}")


def _tried(measure: Callable[[], Result]) -> Result:
    """A variant that a card cannot do must not cost the others their turn."""
    try:
        return measure()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's are RuntimeErrors
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def _keep(name: str, results: dict[str, Result], output: Path) -> None:
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in results[name].items()}
    print(f"{name}: {', '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)


if __name__ == "__main__":
    main()
