"""Time of a compiled program by kind and by role of kernel, from one run under JAX's profiler."""

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


class Role(NamedTuple):
    """What the kernels of one role (`hlo`) took."""

    role: str
    kernels: int  # launches, by the program's text
    seconds: float
    gbytes: float  # read and written, by the program's text
    gb_s: float  # the rate of the two


def by_kind(events: Iterable[Event], text: str) -> dict[str, float]:
    """The seconds of events of a program's run, by kind, the longest first.

    Kernels that overlap, on several streams or cores, each count.
    """
    return dict(_seconds(events, hlo.kinds(text), text).most_common())


def by_role(events: Iterable[Event], text: str) -> list[Role]:
    """Kernels, seconds and bytes of a program's run by role, the longest first."""
    roles = {kernel.name: kernel.role for kernel in hlo.each(text)}
    seconds = _seconds(events, roles, text)
    known, rows = hlo.kernels(text, by="role"), []
    for role in {*seconds, *known.count}:
        gbytes, took = known.bytes[role] / 1e9, seconds[role]
        rate = gbytes / took if took else 0.0
        rows.append(Role(role, known.count[role], took, gbytes, rate))
    return sorted(rows, key=lambda row: row.seconds, reverse=True)


def _seconds(events: Iterable[Event], groups: dict[str, str], text: str) -> collections.Counter:
    """The seconds of events by the group of their instruction, by its name."""
    by_kernel = {_kernel(name): group for name, group in groups.items()}
    own = {own: groups[name] for name, own in hlo.own_names(text).items() if name in groups}
    found = collections.Counter()
    for event in events:
        group = groups.get(event.op) or groups.get(event.name) or by_kernel.get(event.name)
        # XLA numbers kernels of the same name.
        group = group or own.get(re.sub(r"__\d+$", "", event.name))
        if group is None and event.on_gpu:
            matching = (kind for pattern, kind in _LIBRARIES if pattern.search(event.name))
            group = next(matching, "other")
        if group is not None:  # on a CPU the rest is the host's own work
            found[group] += event.seconds
    return found


def _kernel(instruction: str) -> str:
    """The name of XLA's kernel for an instruction."""
    return re.sub(r"[^\w]", "_", instruction)


def profile(run: Callable[[], object]) -> list[Event]:
    """The profiler's events of `run`, which runs a compiled program once and need not wait."""
    return list(_events(run))


def _events(run) -> Iterator[Event]:
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
