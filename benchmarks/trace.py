"""Where the time of a compiled program goes: one run under JAX's profiler, by kind of kernel."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import hlo


def seconds_by_kind(run: Callable[[], object], text: str) -> dict[str, float]:
    """Seconds that the kernels of each kind took in `run`, the longest first.

    Kernels that overlap, on several streams or cores, count each for itself.

    Args:
        run: runs the program once, and may return before it is done.
        text: the compiled program, as its `as_text` tells it.
    """
    kinds, found = hlo.kinds(text), collections.Counter()
    for name, seconds in _events(run):
        if name in kinds:
            found[kinds[name]] += seconds
    return dict(found.most_common())


def _events(run):
    """(name of the instruction, seconds) of all that the profiler saw."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        planes = [
            plane for file in files for plane in jax.profiler.ProfileData.from_file(file).planes
        ]
    # A GPU's kernels are on planes of their own, each with its instruction among its numbers.
    on_devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_devices or planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op") if on_devices else event.name
                yield name, event.duration_ns / 1e9
