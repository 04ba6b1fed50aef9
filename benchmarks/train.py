"""The training step: counted, then measured.

    python -m benchmarks.train --size small --batch 2 --dtype float32 --output train.json

Prints the model's arithmetic (our count and XLA's), the bytes that the compiled program moves, the
least time for both at the speeds measured on this machine, the measured time, and time and bytes by
role of kernel (one step more, under JAX's profiler; `benchmarks.hlo`). XLA counts the body of a
loop once; with `--accumulate` its counts are multiplied by the parts, a little too much for
operations outside the loop. MFU is the model's arithmetic over the measured time and matmul
speed. Needs jax, flax, optax and numpy; no data.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, sizes, trace
from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import dit, flops, kernel_choice
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import device_speed, process_memory
from cwm_jax.training import train_step
from cwm_jax.training.config import ComputeConfig, OptimizerConfig
from cwm_jax.training.train_step import TrainSetup

OPTIM = OptimizerConfig(lr=1e-4, weight_decay=0.01, warmup_steps=2000, grad_clip=1.0, ema_decay=0.0)


def random_batch(clips: int, frames: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (clips, frames, *FRAME_SHAPE), np.uint8),
        "actions": rng.integers(-1, 15, (clips, frames)).astype(np.int32),
    }


def measure(
    network: DiTConfig,
    *,
    clips: int,
    frames: int = 32,
    step: ComputeConfig,
    steps: int = 10,
    rates: dict[str, float] | None = None,
) -> dict[str, object]:
    """Compiles and times steps on one device; `rates` come from `machine_speed`."""
    rates = rates or machine_speed(network.compute_dtype)
    state = train_step.init_state(network, OPTIM, 0)
    batch = jax.device_put(random_batch(clips, frames))
    key = jax.random.key(0)
    start = time.perf_counter()
    setup = TrainSetup(network=network, optim=OPTIM, compute=step)
    compiled = train_step.train_step.lower(state, batch, key, setup).compile()
    compile_seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    state, times, cpu_times, loss = _times(compiled, state, batch, key, steps)
    text = compiled.as_text()
    events = trace.profile(lambda: compiled(state, batch, key))
    asked = flops.train_step(network, clips=clips, frames=frames)
    parts = step.accumulate_steps
    moved = parts * float(cost.get("bytes accessed", np.nan))
    seconds = float(np.median(times))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(network.compute_dtype),
        **kernel_choice.settings(network),
        "remat": step.remat,
        "accumulate_steps": step.accumulate_steps,
        "clips": clips,
        "frames": frames,
        "parameters": dit.parameter_count(dit.shapes(network)),
        "model_tflop": asked.total / 1e12,
        "xla_tflop": parts * float(cost.get("flops", np.nan)) / 1e12,
        "xla_gbytes": moved / 1e9,
        "working_gbytes": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "floor_matmul_s": asked.total / rates["matmul_flops"],
        "floor_copy_s": moved / rates["copy_bytes"],
        "compile_s": compile_seconds,
        "step_s": seconds,
        "step_best_s": float(min(times)),
        "step_cpu_s": float(np.median(cpu_times)),  # of all threads of this process
        "frames_per_s": clips * frames / seconds,
        "mfu": asked.total / seconds / rates["matmul_flops"],
        "loss": loss,
        "seconds_by_kind": trace.by_kind(events, text),
        "roles": [role._asdict() for role in trace.by_role(events, text)],
        **rates,
    }


def machine_speed(dtype: jnp.dtype) -> dict[str, float]:
    return {
        "matmul_flops": device_speed.matmul_flops(dtype),
        "copy_bytes": device_speed.copy_bytes(),
    }


def _times(compiled, state, batch, key, steps: int) -> tuple:
    """The last state; seconds, and seconds of processors, of each step but the first; a loss.

    Each step is waited for after the next was started, as in the training loop.
    """
    state, metrics = compiled(state, batch, key)
    jax.block_until_ready(metrics)
    times, cpu_times = [], []
    clock, cpu = time.perf_counter(), time.process_time()
    for i in range(steps + 1):
        before = metrics
        if i < steps:
            state, metrics = compiled(state, batch, key)
        if i:
            jax.block_until_ready(before)
            now, cpu_now = time.perf_counter(), time.process_time()
            times.append(now - clock)
            cpu_times.append(cpu_now - cpu)
            clock, cpu = now, cpu_now
    return state, times, cpu_times, float(metrics["train/loss"])


def show(found: dict) -> str:
    """A measurement as readable lines."""
    floor = found["floor_matmul_s"], found["floor_copy_s"]
    return "\n".join(
        [
            f"device       {found['device']}, jax {found['jax']}, {found['dtype']}, attention "
            f"{found['attention']}, norm {found['norm']}, remat {found['remat']}",
            f"model        {found['parameters']:,} parameters, {found['clips']} clips of "
            f"{found['frames']} frames",
            f"arithmetic   {found['model_tflop']:.3f} TFLOP by our count, "
            f"{found['xla_tflop']:.3f} by XLA's",
            f"memory       {found['xla_gbytes']:.1f} GB moved by XLA's count, "
            f"{found['working_gbytes']:.2f} GB within the step",
            f"machine      {found['matmul_flops'] / 1e12:.3g} TFLOP/s of matrix products, "
            f"{found['copy_bytes'] / 1e9:.4g} GB/s of copying",
            f"floor        {floor[0]:.4g} s for the arithmetic, {floor[1]:.4g} s for the bytes",
            f"measured     {found['step_s']:.4g} s a step (best {found['step_best_s']:.4g}; "
            f"{found['step_cpu_s']:.4g} s of processors), compiled in {found['compile_s']:.1f} s",
            f"rate         {1 / found['step_s']:.3g} steps/s, {found['frames_per_s']:.5g} "
            f"frames/s, MFU {found['mfu']:.1%}",
            f"kernels      {_shares(found['seconds_by_kind'])}",
            "",
            machine.table(found["roles"]),
        ]
    )


def _shares(seconds: dict[str, float]) -> str:
    """Time by kind; parallel kernels each count, so the sum can exceed a step."""
    total = sum(seconds.values())
    return ", ".join(f"{kind} {s:.3g} s ({s / total:.0%})" for kind, s in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--attention", default="auto", help="xla, fused, cudnn or auto")
    parser.add_argument("--remat", choices=dit.REMAT, default="none")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=path_flag, help="gets the numbers as JSON")
    args = parser.parse_args()
    process_memory.claim_gpu()
    process_memory.schedule_for_memory()
    network = sizes.network(args.size, dtype=args.dtype, attention=args.attention)
    at_once = args.batch // args.accumulate
    found = measure(
        kernel_choice.measured(network, clips=at_once, frames=args.frames),
        clips=args.batch,
        frames=args.frames,
        step=ComputeConfig(remat=args.remat, accumulate_steps=args.accumulate),
        steps=args.steps,
    )
    print(show(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with shown_to_user():
        main()
