"""Time of a compiled program by kind of kernel, from one run under JAX's profiler."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import hlo

# Kernels of libraries, and copies, have their own names; the first matching pattern counts.
_LIBRARIES = (
    (re.compile(r"cudnn|fmha|flash", re.IGNORECASE), "attention (cuDNN)"),
    (re.compile(r"nvjet|gemm|cublas|cutlass|xmma|splitk", re.IGNORECASE), "matmul (cuBLAS)"),
    (re.compile(r"nccl", re.IGNORECASE), "between devices"),
    (re.compile(r"memcpy|memset", re.IGNORECASE), "copy or transpose"),
)


class Event(NamedTuple):
    """An event of the profiler."""

    name: str
    seconds: float
    on_gpu: bool
    # The instruction, if the profiler has it; within a CUDA graph that of the command buffer.
    op: str = ""


def seconds_by_kind(run: Callable[[], object], text: str) -> dict[str, float]:
    """Seconds that the kernels of each kind took in `run`, the longest first.

    Kernels that overlap, on several streams or cores, each count.

    Args:
        run: runs the program once, and may return before it is done.
        text: the compiled program, as its `as_text` returns it.
    """
    return by_kind(_events(run), text)


def by_kind(events: Iterable[Event], text: str) -> dict[str, float]:
    """The seconds of events of a program's run, by kind, the longest first."""
    kinds, found = hlo.kinds(text), collections.Counter()
    by_kernel = {_kernel(name): kind for name, kind in kinds.items()}
    for event in events:
        kind = kinds.get(event.op) or kinds.get(event.name) or by_kernel.get(event.name)
        if kind is None and event.on_gpu:
            matching = (kind for pattern, kind in _LIBRARIES if pattern.search(event.name))
            kind = next(matching, "other")
        if kind is not None:  # on a CPU the rest is the host's own work
            found[kind] += event.seconds
    return dict(found.most_common())


def _kernel(instruction: str) -> str:
    """The name of XLA's kernel for an instruction."""
    return re.sub(r"[^\w]", "_", instruction)


def _events(run) -> Iterator[Event]:
    """All events of the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        planes = [
            plane for file in files for plane in jax.profiler.ProfileData.from_file(file).planes
        ]
    on_devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_devices or planes:
        # On a GPU, kernels are on the lines of its streams; other lines may repeat the same time.
        lines = [line for line in plane.lines if line.name.startswith("Stream")]
        for line in lines if on_devices and lines else plane.lines:
            for event in line.events:
                op = str(dict(event.stats).get("hlo_op", "")) if on_devices else ""
                yield Event(event.name, event.duration_ns / 1e9, bool(on_devices), op)
