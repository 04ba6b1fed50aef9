"""The training step compiled for an H200 on a machine that has none: kernels, bytes, memory.

    python -m benchmarks.gpu_program --output gpu_program.json

This times nothing: the program is compiled and analysed, not run. Needs the CUDA plugin of jax
(`pip install "jax[cuda13]"`), of jax 0.11 or newer, but no GPU; some minutes for each variant.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hlo, machine, sizes
from benchmarks.train import OPTIM
from cwm_jax.coinrun import FRAME_SHAPE
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import flops
from cwm_jax.models.dit import REMAT
from cwm_jax.runtime import process_memory, sharding
from cwm_jax.training import train_step
from cwm_jax.training.config import ComputeConfig

TARGET = Path(__file__).parent / "targets" / "h200.txtpb"


def compile_for_target(network, step: ComputeConfig, *, clips: int, frames: int, devices=1):
    """The compiled program of a step over `devices` GPUs, which cannot be run here."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(encoding="utf-8"), topology=f"1x1x{devices}"
    )
    mesh = Mesh([[device] for device in topology.devices], sharding.AXES)
    fresh = lambda: train_step.init_state(network, OPTIM, 0)
    state = sharding.abstract(jax.eval_shape(fresh), mesh)
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.by_clip(mesh))
    shape = clips * devices, frames
    batch = {"frames": place((*shape, *FRAME_SHAPE), jnp.uint8), "actions": place(shape, jnp.int32)}
    key = sharding.abstract(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    # Kernels of Pallas query the kind of device when they are lowered.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        setup = train_step.TrainSetup(network=network, optim=OPTIM, compute=step, mesh=mesh)
        traced = train_step.train_step.trace(state, batch, key, setup)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def measure(network, step, *, clips: int, frames: int, devices: int) -> dict:
    start = time.perf_counter()
    compiled = compile_for_target(network, step, clips=clips, frames=frames, devices=devices)
    taken, text = compiled.memory_analysis(), compiled.as_text()
    found = hlo.kernels(text)
    state = taken.argument_size_in_bytes + taken.output_size_in_bytes - taken.alias_size_in_bytes
    return {
        "model_tflop": flops.train_step(network, clips=clips, frames=frames).total / 1e12,
        "kernels": found.total_count,
        "gbytes": found.total_bytes / 1e9,
        "state_gbytes": state / 1e9,
        "working_gbytes": taken.temp_size_in_bytes / 1e9,
        "compile_s": time.perf_counter() - start,
        "kinds": {kind: [n, found.bytes[kind] / 1e9] for kind, n in found.count.items()},
        "roles": _roles(text),
    }


def _roles(text: str) -> dict[str, list]:
    """Launches and gigabytes of the kernels of each role, those with the most bytes first."""
    found = hlo.kernels(text, by="role")
    return {role: [found.count[role], n / 1e9] for role, n in found.bytes.most_common()}


def table_of_roles(found: dict) -> str:
    """Kernels and bytes of one variant by role."""
    rows = [
        {"role": role, "kernels": launches, "GB": gbytes}
        for role, (launches, gbytes) in found["roles"].items()
    ]
    return machine.table(rows)


def table(results: dict[str, dict]) -> str:
    head = (
        "variant",
        "kernels",
        "GB moved",
        "by matmuls",
        "attention",
        "copies",
        "between devices",
        "GB within the step",
        "compiled in, s",
    )
    lines = [head, ["---"] * len(head)]
    for name, found in results.items():
        moved = lambda word, kinds=found["kinds"]: sum(
            gbytes for kind, (_, gbytes) in kinds.items() if kind.startswith(word)
        )
        parts = [f"{moved(word):.0f}" for word in ("matmul", "attention", "copy")]
        parts += [f"{moved('between'):.2f}", f"{found['working_gbytes']:.1f}"]
        total = f"{found['gbytes']:.0f}"
        lines.append([name, str(found["kernels"]), total, *parts, f"{found['compile_s']:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"])
    parser.add_argument("--norm", choices=("xla", "triton"), default="xla")
    parser.add_argument("--mlp", choices=("xla", "triton"), default="xla")
    parser.add_argument("--library", action="store_true", help="products in cuBLAS, with GELU")
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=list(REMAT))
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step")
    parser.add_argument("--devices", type=int, default=1, help="each with so many clips")
    parser.add_argument(
        "--output",
        type=path_flag,
        help="JSON file of all numbers; variants in it are not compiled again",
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # there is no GPU to start
    process_memory.schedule_for_memory()  # as train.py does
    if args.library:
        process_memory.multiply_by_library()
    results = {}
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    for attention, remat in itertools.product(args.attention, args.remat):
        name = f"{args.size} × {args.batch}, {attention}, {remat}, parts {args.accumulate}"
        name += f", devices {args.devices}" if args.devices > 1 else ""
        name += f", norm {args.norm}" if args.norm != "xla" else ""
        name += f", mlp {args.mlp}" if args.mlp != "xla" else ""
        name += ", products by library" if args.library else ""
        if name in results:
            continue
        step = ComputeConfig(remat=remat, accumulate_steps=args.accumulate)
        shape = dict(clips=args.batch, frames=args.frames, devices=args.devices)
        network = sizes.network(args.size, dtype="bfloat16", attention=attention)
        network = dataclasses.replace(network, norm=args.norm, mlp=args.mlp)
        results[name] = measure(network, step, **shape)
        results[name]["jax"] = jax.__version__
        print(f"{name}: compiled in {results[name]['compile_s']:.0f} s", flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("Compiled for one H200 on a machine without one. No time was measured.\n")
    print(table(results))
    for name, found in results.items():
        if "roles" in found:  # files of earlier versions lack them
            print(f"\n{name}\n\n{table_of_roles(found)}")


if __name__ == "__main__":
    with shown_to_user():
        main()
