"""The network against the original's numbers, and the variants of attention and of a training step.

    python -m benchmarks.network --size small --batch 128 --output network.json

Each result is printed and written at once, the most important first. Run by
`benchmarks.gpu`; needs jax, flax, optax and numpy, and a checkout.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import machine, sizes, train
from cwm_jax.checkpoints import torch_format
from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import denoiser, schedule
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import attention, dit, rope
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import device_speed, process_memory
from cwm_jax.training.config import ComputeConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

Result = dict[str, object]


def config(dtype: str, kernel: str) -> DiTConfig:
    """The network of the golden numbers."""
    described = json.loads((GOLDEN / "model.json").read_text(encoding="utf-8"))
    names = "patch_size", "hidden_size", "depth", "num_heads", "num_actions", "max_frames"
    return DiTConfig(
        **{name: described[name] for name in names},
        image_size=described["input_size"],
        dtype=dtype,
        attention=kernel,
    )


def arrays(name: str) -> dict[str, np.ndarray]:
    """The parameters of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {name: file[name] for name in file.files}


def parameters(network: DiTConfig) -> dit.Params:
    """The golden ones."""
    found = torch_format.from_original(arrays("weights_step0"), network)
    return {name: jax.numpy.asarray(value) for name, value in found.items()}


def parity(dtype: str, kernel: str) -> Result:
    """Largest difference of a velocity, and of the loss, from the original's results.

    `within`: at most 1e-4 everywhere in float32; in bfloat16, root mean squares of 5 %.
    """
    network, golden = config(dtype, kernel), arrays("forward")
    noise = golden["noise"].astype(np.float32)
    sample = schedule.noised(to_model(golden["frames"]), golden["t"], noise)
    forward = jax.jit(lambda params, *args: denoiser.bind(network, params)(*args))
    v = np.asarray(forward(parameters(network), sample.x, golden["t"], golden["actions"]))
    rms = lambda x: float(np.sqrt(np.square(x).mean()))
    wrong, right = v - golden["v_pred"], rms(golden["v_pred"])
    worst = float(np.abs(wrong).max())
    return {
        "dtype": dtype,
        "attention": kernel,
        "within": worst <= 1e-4 if dtype == "float32" else rms(wrong) <= 0.05 * right,
        "worst_v": worst,
        "rms_v": rms(wrong),
        "rms_of_v": right,
        "loss_off": abs(float(schedule.loss(v, sample.velocity)) - float(golden["loss"])),
    }


def attention_time(network: DiTConfig, kernel: str, over: str, *, clips: int) -> Result:
    """Seconds of one attention, from qkv, forward and with its gradients, over whole windows."""
    frames, tokens = network.max_frames, network.tokens
    shape = clips, frames, tokens, 3 * network.hidden_size
    angles = rope.spatial_angles(network.grid, network.head_size)
    along = attention.along_space
    if over == "time":
        along, angles = attention.along_time, rope.temporal_angles(range(frames), network.head_size)
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], shape, network.compute_dtype)
    grad = jax.random.normal(keys[1], (*shape[:3], network.hidden_size), network.compute_dtype)
    attend = lambda qkv: along(qkv, angles, num_heads=network.num_heads, implementation=kernel)

    @jax.jit
    def both(qkv, grad):
        out, pull = jax.vjp(attend, qkv)
        return out, pull(grad)

    times = device_speed.best_time(jax.jit(attend), qkv), device_speed.best_time(both, qkv, grad)
    return {
        "attention": kernel,
        "over": over,
        "forward_s": times[0],
        "forward_and_back_s": times[1],
        "forward_gb_s": (qkv.nbytes + grad.nbytes) / times[0] / 1e9,  # least bytes read and written
    }


class Variant(NamedTuple):
    """A training step to time."""

    attention: str
    norm: str
    remat: str = "none"
    accumulate_steps: int = 1
    mlp: str = "xla"


def variants(*, on_gpu: bool) -> list[Variant]:
    """The variants, the most important first."""
    if not on_gpu:
        return [Variant("xla", "xla", remat) for remat in ("gelu_norm", "none", "layer")]
    return [
        Variant("fused", "triton", "gelu_norm"),  # as in configs/small.py
        Variant("fused", "triton"),
        Variant("fused", "triton", mlp="triton"),
        Variant("fused", "triton", "gelu_norm", mlp="triton"),
        Variant("fused", "xla"),
        Variant("cudnn", "xla"),
        Variant("xla", "xla", "gelu_norm"),
        Variant("fused", "triton", "layer"),
        Variant("fused", "triton", "gelu_norm", 2),
    ]


def measurements(size: str, clips: int) -> Iterator[tuple[str, Result, Callable[[], Result]]]:
    """Section, description and function of each measurement; the most important first."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    kernels = ("fused", "cudnn", "xla") if on_gpu else ("xla",)
    network = lambda kernel: sizes.network(size, dtype=dtype, attention=kernel)
    speeds: dict[str, float] = {}

    def measure_machine() -> Result:
        speeds.update(train.machine_speed(network("xla").compute_dtype))
        return speeds

    def step_time(variant: Variant) -> Result:
        how = ComputeConfig(remat=variant.remat, accumulate_steps=variant.accumulate_steps)
        known = dataclasses.replace(network(variant.attention), norm=variant.norm, mlp=variant.mlp)
        return train.measure(known, clips=clips, step=how, steps=10, rates=speeds)

    yield "machine", machine.description() | {"dtype": dtype}, measure_machine
    for dtype_, kernel in [("float32", "xla"), *(("bfloat16", kernel) for kernel in kernels)]:
        asked = {"dtype": dtype_, "attention": kernel}
        yield "parity", asked, lambda a=asked: parity(a["dtype"], a["attention"])
    first, *others = variants(on_gpu=on_gpu)
    yield "step", first._asdict(), lambda: step_time(first)
    for over in ("space", "time"):
        for kernel in kernels:
            measure = lambda over=over, kernel=kernel: attention_time(
                network(kernel), kernel, over, clips=clips
            )
            yield "attention", {"over": over, "attention": kernel}, measure
    for variant in others:
        yield "step", variant._asdict(), lambda variant=variant: step_time(variant)


def tried(measure: Callable[[], Result]) -> Result:
    """A variant that a card does not support must not stop the others."""
    try:
        return measure()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's are RuntimeErrors
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128, help="clips a step")
    parser.add_argument("--output", type=path_flag, required=True, help="gets the numbers as JSON")
    args = parser.parse_args()
    process_memory.claim_gpu()
    process_memory.schedule_for_memory()
    found: dict[str, list[Result]] = {}
    for section, asked, measure in measurements(args.size, args.batch):
        row = asked | tried(measure)
        found.setdefault(section, []).append(row)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{section}: {machine.described(row)}", flush=True)


if __name__ == "__main__":
    with shown_to_user():
        main()
