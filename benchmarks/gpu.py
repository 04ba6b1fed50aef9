"""All measurements of a GPU, within a time limit: `make bench-gpu`.

    python -m benchmarks.gpu --minutes 7.5 --output runs/bench-gpu [--original DIR]

Golden parity, training steps and attention (`benchmarks.network`), with the kernels of the first
variant by role, then generated frames (`benchmarks.sample`), then, if torch and a checkout of the
PyTorch original are present, its frames and its training step on the same card
(`benchmarks.original`). Each is a program of its own with a share of the minutes, so that none uses
the memory or the time of another.
`results.json` and `results.md` are updated after each part. Needs jax, flax, optax,
orbax-checkpoint and numpy, and a checkout; `--size tiny --batch 2` tries it on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine, sizes
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag

ROOT = Path(__file__).parents[1]

SECTIONS = {
    "machine": ("device", "python", "jax", "dtype", "matmul_flops", "copy_bytes"),
    "parity": ("dtype", "attention", "within", "worst_v", "rms_v", "rms_of_v", "loss_off"),
    "step": (
        *("attention", "norm", "mlp", "remat", "accumulate_steps", "clips"),
        *("step_s", "step_best_s"),
        *("frames_per_s", "mfu", "floor_matmul_s", "floor_copy_s", "xla_gbytes", "working_gbytes"),
        *("compile_s", "seconds_by_kind"),
    ),
    "roles": ("role", "kernels", "seconds", "gbytes", "gb_s"),
    "attention": ("over", "attention", "forward_s", "forward_and_back_s", "forward_gb_s"),
    "sampler": (
        *("window", "B", "S", "context", "ms/frame", "frames/s", "GFLOP/frame"),
        *("of matmul speed", "compile s", "peak GB so far"),
    ),
    "original": ("what", "frames", "clips", "step_s", "step_best_s", "first_step_s"),
    "parts": ("part", "how it ended"),
}

Row = dict[str, object]


class Part(NamedTuple):
    """A program to run; unused time of its share is available to later ones."""

    name: str
    share: float  # of all minutes, relative to the other parts
    module: str
    words: str  # the last is the flag of its output file


def parts(size: str, clips: int, original: Path | None = None) -> list[Part]:
    """The parts, in order. Frames are generated with a full window, so that all modes differ."""
    full = sizes.network(size).max_frames
    generate = lambda name, share, how: Part(
        name, share, "benchmarks.sample", f"--size {size} --context {full} {how} --rows-only --json"
    )
    step = f"--size {size} --batch {clips}"
    found = [
        Part("network", 4.0, "benchmarks.network", f"{step} --output"),
        generate("sampler-one", 1.2, "--batch 1 --steps 1,4,10 --window cached"),
        generate("sampler-ways", 1.0, "--batch 1 --steps 10 --window plain,exact,hop"),
        generate("sampler-many", 1.3, "--batch 4,16,64,256 --steps 1,4,10 --window cached"),
    ]
    if original:
        theirs = f"--folder {original} {step} --steps 10 --draw {full} --compile --output"
        found.append(Part("original", 3.0, "benchmarks.original", theirs))
    return found


def run(part: Part, seconds: float, output: Path) -> str:
    """Runs a part for at most so many seconds, and returns how it ended."""
    command = [sys.executable, "-m", part.module, *part.words.split()]
    begun = time.monotonic()
    with (output / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, str(output.resolve() / f"{part.name}.json")],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"stopped after {seconds:.0f} s; its rows so far are kept"
    took = f"{time.monotonic() - begun:.0f} s"
    return f"done in {took}" if code == 0 else f"failed after {took}: {_last_line(log.name)}"


def _last_line(log: str) -> str:
    lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")[:300]


def gather(output: Path, ended: dict[str, str]) -> dict[str, list[Row]]:
    """All rows that the parts have written so far, by section."""
    found: dict[str, list[Row]] = {}
    for name, how in ended.items():
        file = output / f"{name}.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if name.startswith("sampler"):
            results = {"sampler": results.get("rows", [])}
        elif name == "original":
            results = {"original": [{"what": what} | numbers for what, numbers in results.items()]}
        if steps := [row for row in results.get("step", ()) if "roles" in row]:
            results = results | {"roles": steps[0]["roles"]}  # of the first variant
        for section, rows in results.items():
            found.setdefault(section, []).extend(rows)
        found.setdefault("parts", []).append({"part": name, "how it ended": how})
    return found


def report(found: dict[str, list[Row]]) -> str:
    """The rows as Markdown tables, in the order of `SECTIONS`."""
    tables = []
    for section, columns in SECTIONS.items():
        if rows := found.get(section):
            failed = ("failed",) if any("failed" in row for row in rows) else ()
            tables.append(f"## {section}\n\n{machine.table(rows, (*columns, *failed))}\n")
    return "\n".join(tables)


def keep(output: Path, ended: dict[str, str]) -> None:
    found = gather(output, ended)
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "results.md").write_text(report(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sizes.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128, help="clips a step")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--original", type=path_flag, help="a checkout of the PyTorch original")
    parser.add_argument("--output", type=path_flag, default=Path("runs/bench-gpu"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start, ended = time.monotonic(), {}
    wanted = parts(args.size, args.batch, args.original and args.original.resolve())
    for number, part in enumerate(wanted):
        (args.output / f"{part.name}.json").unlink(missing_ok=True)  # of an earlier run
        left = 60 * args.minutes - (time.monotonic() - start)
        share = part.share / sum(later.share for later in wanted[number:])
        ended[part.name] = run(part, share * left, args.output)
        keep(args.output, ended)
        print(f"{part.name}: {ended[part.name]}", flush=True)
    print((args.output / "results.md").read_text(encoding="utf-8"))
    print(f"all numbers are in {args.output / 'results.json'}")


if __name__ == "__main__":
    with shown_to_user():
        main()
