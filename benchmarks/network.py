"""The network against the original's numbers, and the variants of attention and of a training step.

    python -m benchmarks.network --size small --batch 128 --output network.json

Each result is printed and written when it is there, the most wanted first. Run by
`benchmarks.gpu`; needs jax, flax, optax and numpy, and a checkout.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import machine, sizes, train
from cwm_jax import attention, denoiser, diffusion, memory, speed, torch_format
from cwm_jax.coinrun import to_model
from cwm_jax.network import DiTConfig
from cwm_jax.training import StepConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

Result = dict[str, object]


def parity(dtype: str, kernel: str) -> Result:
    """Largest difference of a velocity, and of the loss, from what the original computed.

    `within`: at most 1e-4 everywhere in float32; in bfloat16, root mean squares of 5 %.
    """
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
    network = jax.jit(lambda params, *args: denoiser.bind(config, params)(*args))
    v = np.asarray(network(params, sample.x, golden["t"], golden["actions"]))
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


def variants(*, on_gpu: bool) -> list[tuple[str, str, int]]:
    """Attention, `remat` and parts of the training steps to time, the most wanted first."""
    if not on_gpu:
        return [("xla", "gelu_norm", 1), ("xla", "none", 1), ("xla", "layer", 1)]
    return [
        ("cudnn", "gelu_norm", 1),  # what configs/small.py takes
        ("cudnn", "none", 1),
        ("xla", "gelu_norm", 1),
        ("cudnn", "layer", 1),
        ("cudnn", "gelu_norm", 2),
        ("xla", "none", 1),  # too much for 80 GB at 128 clips
    ]


def measurements(size: str, clips: int) -> Iterator[tuple[str, Result, Callable[[], Result]]]:
    """Section, what is asked, and how to answer it; the most wanted first."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    kernels = ("cudnn", "xla") if on_gpu else ("xla",)
    network = lambda kernel: sizes.network(size, dtype=dtype, attention=kernel)
    speeds: dict[str, float] = {}

    def measure_machine() -> Result:
        speeds.update(train.machine_speed(network("xla").compute_dtype))
        return speeds

    def step_time(kernel: str, remat: str, parts: int) -> Result:
        how = StepConfig(remat=remat, accumulate_steps=parts)
        return train.measure(network(kernel), clips=clips, step=how, steps=10, machine=speeds)

    yield "machine", machine.description() | {"dtype": dtype}, measure_machine
    for dtype_, kernel in [("float32", "xla"), *(("bfloat16", kernel) for kernel in kernels)]:
        asked = {"dtype": dtype_, "attention": kernel}
        yield "parity", asked, lambda a=asked: parity(a["dtype"], a["attention"])
    steps = [
        (
            {"attention": kernel, "remat": remat, "accumulate_steps": parts},
            lambda variant=(kernel, remat, parts): step_time(*variant),
        )
        for kernel, remat, parts in variants(on_gpu=on_gpu)
    ]
    yield "step", *steps[0]
    for over in ("space", "time"):
        for kernel in kernels:
            measure = lambda over=over, kernel=kernel: attention_time(
                network(kernel), kernel, over, clips=clips
            )
            yield "attention", {"over": over, "attention": kernel}, measure
    for asked, measure in steps[1:]:
        yield "step", asked, measure


def tried(measure: Callable[[], Result]) -> Result:
    """A variant that a card cannot do must not cost the others their turn."""
    try:
        return measure()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's are RuntimeErrors
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128, help="clips a step")
    parser.add_argument("--output", type=Path, required=True, help="gets the numbers as JSON")
    args = parser.parse_args()
    memory.claim_gpu()
    memory.schedule_for_memory()
    found: dict[str, list[Result]] = {}
    for section, asked, measure in measurements(args.size, args.batch):
        row = asked | tried(measure)
        found.setdefault(section, []).append(row)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{section}: {machine.told(row)}", flush=True)


if __name__ == "__main__":
    main()
