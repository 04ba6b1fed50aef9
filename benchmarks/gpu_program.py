"""The training step compiled for an H200 on a machine that has none: kernels, bytes, memory.

    python -m benchmarks.gpu_program --output gpu_program.json

This times nothing: the program is compiled, read and thrown away. Needs the CUDA plugin of jax
(`pip install "jax[cuda13]"`) but no GPU; some minutes for each variant.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hlo, sizes
from benchmarks.train import OPTIM
from cwm_jax import flops, parallel, training
from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.model import REMAT

TARGET = Path(__file__).parent / "targets" / "h200.txtpb"


def compile_for_target(network, step: training.StepConfig, *, clips: int, frames: int, devices=1):
    """The compiled program of a step over `devices` GPUs, which cannot be run here."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{devices}"
    )
    mesh = Mesh([[device] for device in topology.devices], parallel.AXES)
    fresh = lambda: training.init_state(network, OPTIM, 0)
    state = parallel.abstract(jax.eval_shape(fresh), mesh)
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.by_clip(mesh))
    shape = clips * devices, frames
    batch = {"frames": place((*shape, *FRAME_SHAPE), jnp.uint8), "actions": place(shape, jnp.int32)}
    key = parallel.abstract(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    lowered = training.train_step.lower(
        state, batch, key, network=network, optim=OPTIM, step=step, mesh=mesh
    )
    return lowered.compile()


def measure(size: str, attention: str, step, *, clips: int, frames: int) -> dict:
    network = sizes.network(size, dtype="bfloat16", attention=attention)
    start = time.perf_counter()
    compiled = compile_for_target(network, step, clips=clips, frames=frames)
    memory, found = compiled.memory_analysis(), hlo.kernels(compiled.as_text())
    return {
        "size": size,
        "attention": attention,
        "remat": step.remat,
        "accumulate_steps": step.accumulate_steps,
        "clips": clips,
        "model_tflop": flops.train_step(network, clips=clips, frames=frames).total / 1e12,
        "kernels": found.total_count,
        "gbytes": found.total_bytes / 1e9,
        "working_gbytes": memory.temp_size_in_bytes / 1e9,
        "compile_s": time.perf_counter() - start,
        "kinds": {kind: [n, found.bytes[kind] / 1e9] for kind, n in found.count.items()},
    }


def row(found: dict) -> str:
    cells = found["size"], found["attention"], found["remat"], found["accumulate_steps"]
    numbers = f"{found['kernels']} | {found['gbytes']:.0f} | {found['working_gbytes']:.1f}"
    return f"| {' | '.join(map(str, cells))} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"])
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=list(REMAT))
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--output", type=Path, help="gets all numbers as JSON")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # there is no GPU to start
    print("Compiled for one H200 on a machine without one. No time was measured.\n")
    print("| size | attention | remat | parts | kernels | GB moved | GB within the step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for attention in args.attention:
        for remat in args.remat:
            step = training.StepConfig(remat=remat, accumulate_steps=args.accumulate)
            results.append(
                measure(args.size, attention, step, clips=args.batch, frames=args.frames)
            )
            print(row(results[-1]), flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
