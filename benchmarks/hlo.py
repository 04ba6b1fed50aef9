"""Analyses a program compiled by XLA: its kernels, and the bytes that they read and write.

Every instruction left at the top of a compiled GPU program is about one kernel; its operands are
read and its results written. A cache may reduce that traffic, a workspace increase it.
"""

import collections
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
_BYTES |= {"f64": 8, "f32": 4, "s32": 4, "u32": 4}
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_CALLS = {"call", "while", "conditional", "async-start"}

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\([^=]*?\)|\S+) (?P<op>[\w-]+)"
    r"\((?P<args>[^)]*)\)(?P<rest>.*)$"
)
_COMMENT = re.compile(r"/\*.*?\*/")  # such as /*index=5*/ within a long tuple
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")


class Kernels(NamedTuple):
    """Kernels of a program by kind."""

    count: collections.Counter
    bytes: collections.Counter

    @property
    def total_count(self) -> int:
        return sum(self.count.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def kernels(text: str) -> Kernels:
    """Counts the kernels of a compiled program's text; those of a loop once for each round."""
    computations, entry = _split(text)
    found = Kernels(collections.Counter(), collections.Counter())
    _count(computations, entry, 1, found)
    return found


def kinds(text: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program that does work, by its name."""
    computations, _ = _split(text)
    return {
        line["name"]: _kind(line, computations)
        for lines in computations.values()
        for line in lines
        if line["op"] not in _FREE | _CALLS
    }


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


def _count(computations, name: str, times: int, found: Kernels) -> None:
    sizes = {line["name"]: _size(line["shape"]) for line in computations[name]}
    for line in computations[name]:
        op = line["op"]
        if op in _CALLS:
            rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line["rest"])
            for inner in re.findall(r"(?:to_apply|body|calls)=%([\w.-]+)", line["rest"]):
                _count(computations, inner, times * int(rounds[1] if rounds else 1), found)
        elif op not in _FREE and not op.endswith("-done"):
            kind = _kind(line, computations)
            read = sum(sizes.get(arg, 0) for arg in re.findall(r"%([\w.-]+)", line["args"]))
            found.count[kind] += times
            found.bytes[kind] += times * (read + sizes[line["name"]])


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
