"""Analyses a program compiled by XLA: its kernels, and the bytes that they read and write.

Every instruction left at the top of a compiled GPU program is about one kernel; its operands are
read and its results written. A cache may reduce that traffic, a workspace increase it.

A kernel's kind is what computes it (a library, a fusion); its role is the part of the step that it
belongs to, a `jax.named_scope` of the project, forward or backward. A fusion of several parts has
the role of its last operation. Products have their kind as role: a library's kernels cannot be
distinguished by name when they are timed.
"""

import collections
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
_BYTES |= {"f64": 8, "f32": 4, "s32": 4, "u32": 4}
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_CALLS = {"call", "while", "conditional", "async-start"}

# The scopes of the project, outermost first where one is within another.
ROLES = (
    *("examples", "context", "conditioning", "patches", "norm", "attention", "gelu"),
    *("displacements", "warp", "optimizer"),
)
OTHER = "the rest"
LIBRARIES = ("matmul", "attention (cuDNN)", "between devices")

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\([^=]*?\)|\S+) (?P<op>[\w-]+)"
    r"\((?P<args>[^)]*)\)(?P<rest>.*)$"
)
_COMMENT = re.compile(r"/\*.*?\*/")  # such as /*index=5*/ within a long tuple
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")


class Kernel(NamedTuple):
    """An instruction that does work."""

    name: str
    kind: str
    role: str
    launches: int  # within a loop, of all rounds
    bytes: int  # read and written by all launches


class Kernels(NamedTuple):
    """Launches and bytes of a program's kernels, by kind or by role."""

    count: collections.Counter
    bytes: collections.Counter

    @property
    def total_count(self) -> int:
        return sum(self.count.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def kernels(text: str, by: str = "kind") -> Kernels:
    """Counts the kernels of a compiled program's text; those of a loop once for each round.

    `by` is "kind" or "role".
    """
    found = Kernels(collections.Counter(), collections.Counter())
    for kernel in each(text):
        group = getattr(kernel, by)
        found.count[group] += kernel.launches
        found.bytes[group] += kernel.bytes
    return found


def each(text: str) -> list[Kernel]:
    """The kernels of a compiled program's text, in its order."""
    computations, entry = _split(text)
    return list(_each(computations, entry, 1))


def kinds(text: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program that does work, by its name."""
    computations, _ = _split(text)
    return {
        line["name"]: _kind(line, computations)
        for lines in computations.values()
        for line in lines
        if line["op"] not in _FREE | _CALLS
    }


def own_names(text: str) -> dict[str, str]:
    """The names of the project's kernels, which a profiler sees, by instruction."""
    found = {}
    for line in itertools.chain.from_iterable(_split(text)[0].values()):
        if named := re.search(r'op_name="[^"]*?(\w+)/pallas_call"', line["rest"]):
            found[line["name"]] = named[1]
    return found


def _split(text: str) -> tuple[dict[str, list[re.Match]], str]:
    computations: dict[str, list[re.Match]] = {}
    entry = current = ""
    for line in _COMMENT.sub("", text).splitlines():
        if head := _COMPUTATION.match(line):
            current = head["name"]
            computations[current] = []
            entry = current if head["entry"] else entry
        elif current and (instruction := _INSTRUCTION.match(line)):
            computations[current].append(instruction)
    return computations, entry


def _each(computations, name: str, times: int) -> Iterator[Kernel]:
    sizes = {line["name"]: _size(line["shape"]) for line in computations[name]}
    for line in computations[name]:
        op = line["op"]
        if op in _CALLS:
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line["rest"])
            for inner in re.findall(r"(?:to_apply|body|calls)=%([\w.-]+)", line["rest"]):
                yield from _each(computations, inner, times * int(rounds[1] if rounds else 1))
        elif op not in _FREE and not op.endswith("-done"):
            kind = _kind(line, computations)
            read = sum(sizes.get(arg, 0) for arg in re.findall(r"%([\w.-]+)", line["args"]))
            moved = times * (read + sizes[line["name"]])
            yield Kernel(line["name"], kind, _role(line, kind), times, moved)


def _role(line: re.Match, kind: str) -> str:
    if kind.startswith(LIBRARIES):
        return kind
    path = re.search(r'op_name="([^"]*)"', line["rest"])
    scopes = [name for name in re.findall(r"\w+", path[1]) if name in ROLES] if path else []
    if not scopes:
        return OTHER
    direction = ", backward" if "transpose(" in path[1] else ""
    return f"{scopes[-1]}{direction}"


def _size(shape: str) -> int:
    """Bytes of a shape; of a library's results without the workspace, which is last and s8."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    if shape.startswith("(") and arrays and arrays[-1][0] in ("s8", "u8"):
        arrays = arrays[:-1]
    total = 0
    for dtype, axes in arrays:
        size = _BYTES.get(dtype, 4)
        for axis in filter(None, axes.split(",")):
            size *= int(axis)
        total += size
    return total


def _kind(line: re.Match, computations) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', line["rest"])
    if line["op"] == "custom-call" and target:
        library = target[1]
        if "gemm" in library or "matmul" in library:
            return "matmul (cuBLAS)"
        if "triton" in library:
            return "attention (fused)" if "rotary_attention" in line["rest"] else "other kernel"
        return "attention (cuDNN)" if "fmha" in library else "other library"
    if "gemm" in line["rest"] and line["op"] == "fusion":
        return "matmul (Triton)"
    called = re.search(r"calls=%([\w.-]+)", line["rest"])
    inside = computations.get(called[1], []) if called else []
    if "dot" in {line["op"], *(inner["op"] for inner in inside)}:
        return "matmul (XLA)"
    if re.match(r"(all-|reduce-scatter|collective)", line["op"]):
        return "between devices"
    if line["op"] == "copy" or "transpose" in line["name"] or "copy" in line["name"]:
        return "copy or transpose"
    return "fusion" if line["op"] == "fusion" else "other"
