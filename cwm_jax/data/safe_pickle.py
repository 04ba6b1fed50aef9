"""Reads the pickles of dataset records without running them.

A pickle is a program, and `pickle.load` calls any function that the program names. The interpreter
here supports only the instructions for a dict of plain values and NumPy arrays
(`pickletools` documents each). A global is a name to look up in a fixed table, never something
to import, and nothing is called but `numpy.frombuffer`. Values are views onto the record, so
reading a 2 MB video copies nothing, and a pickle cannot allocate more memory than its length.
"""

import enum
import math
import pickle
import pickletools
import struct
from collections.abc import Callable

import numpy as np

MAX_STEPS = 10_000  # a record takes about 70 instructions; one with many extra keys, hundreds
MAX_DIMENSIONS = 32


class RefusedError(Exception):
    """The bytes are no pickle, or one with forbidden content; the message says which."""


class _Known(enum.Enum):
    """The globals an array's pickle names."""

    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    RECONSTRUCT = enum.auto()
    SCALAR = enum.auto()
    FROMBUFFER = enum.auto()


# NumPy 1 writes `numpy.core`, NumPy 2 `numpy._core`; `_frombuffer` comes with pickle protocol 5.
_GLOBALS = {("numpy", "ndarray"): _Known.NDARRAY, ("numpy", "dtype"): _Known.DTYPE}
for _core in ("numpy.core", "numpy._core"):
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Known.RECONSTRUCT
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Known.SCALAR
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Known.FROMBUFFER

# Plain numbers: no objects, no structs, no dates.
_ITEM_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_NO_FIELDS = (None, None, None)  # subdtype, names, fields of a dtype's state


class _DType:
    """A dtype under construction: the pickle sets its byte order after making it."""

    def __init__(self, code: object):
        if not (isinstance(code, str) and code in _ITEM_CODES):
            kind = code[:20] if isinstance(code, str) else "?"
            raise RefusedError(f"it contains an array of dtype {kind!r}, not of plain numbers")
        self.code, self.order = code, "="

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[2:5] == _NO_FIELDS):
            raise RefusedError("it contains an array whose dtype is no plain number")
        if state[1] not in ("<", ">", "|"):
            raise RefusedError("it contains an array of unknown byte order")
        self.order = state[1]


class _Array:
    """An array under construction: the pickle sets its contents after making it."""

    value: np.ndarray | None = None

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise RefusedError("it contains an array with an unknown kind of state")
        _, shape, dtype, fortran, buffer = state
        self.value = _array(buffer, dtype, shape, "F" if fortran else "C")


def _array(buffer: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not (isinstance(dtype, _DType) and isinstance(buffer, memoryview) and order in ("C", "F")):
        raise RefusedError("it contains an array that does not consist of bytes and a dtype")
    if not (isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS):
        raise RefusedError("it contains an array without a proper shape")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise RefusedError("it contains an array whose shape is not integers")
    numpy_dtype = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * numpy_dtype.itemsize != len(buffer):
        raise RefusedError(f"it contains {len(buffer)} bytes for an array of shape {shape}"[:200])
    try:
        return np.frombuffer(buffer, numpy_dtype).reshape(shape, order=order)
    except ValueError:  # of no bytes, and yet too large: (0, 2**70)
        raise RefusedError(f"it contains an array of impossible shape {shape}"[:200]) from None


def _call(function: object, args: object) -> object:
    """What the instruction REDUCE makes: one of four things, none of them by calling a name."""
    match function, args:
        case _Known.DTYPE, (code, False, bool()):
            return _DType(code)
        case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), memoryview()):
            return _Array()
        case _Known.FROMBUFFER, (buffer, dtype, shape, order):
            made = _Array()
            made.value = _array(buffer, dtype, shape, order)
            return made
        case _Known.SCALAR, (dtype, buffer):
            return _array(buffer, dtype, (), "C")[()]
    raise RefusedError(f"it calls {getattr(function, 'name', 'something')} in a way no array needs")


class _Machine:
    """One run over one pickle. `stack` and `marked` are those of the pickle format."""

    def __init__(self, data: bytes):
        self.data, self.at = memoryview(data), 0
        self.stack: list = []
        self.marked: list[list] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_STEPS):
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                return self.end()
            if code not in _INSTRUCTIONS:
                raise RefusedError(f"it uses the instruction {_name(code)}, which no record needs")
            _INSTRUCTIONS[code](self)
        raise RefusedError(f"it takes more than {MAX_STEPS} instructions")

    def end(self) -> object:
        result = self.value()
        if self.stack or self.marked:
            raise RefusedError("it is no pickle: values are left over at its end")
        if self.at != len(self.data):
            raise RefusedError(f"{len(self.data) - self.at} bytes follow the end of its pickle")
        return result

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise RefusedError("it is no pickle, or one cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int | float:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, size: int) -> str:
        return _decoded(self.take(size))

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + 256]).find(b"\n")
        if end < 0:
            raise RefusedError("it is no pickle, or one cut short")
        return _decoded(self.take(end + 1)[:-1])

    def pop(self) -> object:
        if not self.stack:
            raise RefusedError("it is no pickle: it uses a value it never made")
        return self.stack.pop()

    def value(self) -> object:
        """A finished value from the stack, converted for the result."""
        value = self.pop()
        if isinstance(value, _Array):
            value = value.value
            if value is None:
                raise RefusedError("it contains an array without contents")
        if isinstance(value, (_DType, _Known)):
            raise RefusedError("it contains something that is no value")
        return value

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        if not self.marked:
            raise RefusedError("it is no pickle: it returns to a mark it never set")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def make_tuple(self, size: int | None = None) -> None:
        items = self.since_mark() if size is None else [self.pop() for _ in range(size)][::-1]
        self.stack.append(tuple(items))

    def put(self, place: int | float) -> None:
        self.stack.append(top := self.pop())
        self.memo[place] = top

    def get(self, place: int | float) -> None:
        if place not in self.memo:
            raise RefusedError("it is no pickle: it recalls a value it never stored")
        self.stack.append(self.memo[place])

    def into(self, kind: type) -> object:
        """The container on top of the stack, which stays there."""
        self.stack.append(top := self.pop())
        if type(top) is not kind:
            raise RefusedError(
                f"it is no pickle: it fills a {type(top).__name__} like a {kind.__name__}"
            )
        return top

    def set_item(self) -> None:
        value, key = self.value(), self.pop()
        if type(key) not in (str, int):
            raise RefusedError("it contains a dict whose keys are not names")
        self.into(dict)[key] = value

    def set_items(self) -> None:
        items = self.since_mark()
        if len(items) % 2:
            raise RefusedError("it is no pickle: it contains a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack += (key, value)
            self.set_item()

    def append(self) -> None:
        value = self.value()
        self.into(list).append(value)

    def append_all(self) -> None:
        for item in self.since_mark():
            self.stack.append(item)
            self.append()

    def push_global(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError("it is no pickle: it names a global by something that is no text")
        if (module, name) not in _GLOBALS:
            named = f"{module}.{name}"[:100]
            raise RefusedError(f"it refers to {named!r}, which no record needs")
        self.stack.append(_GLOBALS[module, name])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(_call(function, args))

    def build(self) -> None:
        state = self.pop()
        self.stack.append(target := self.pop())
        if not isinstance(target, (_Array, _DType)):
            raise RefusedError("it sets the state of something that is no array")
        target.set_state(state)


def _decoded(raw: memoryview) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise RefusedError("it is no pickle: a text in it is not UTF-8") from None


def _name(code: int) -> str:
    known = pickletools.code2op.get(chr(code))
    return known.name if known else f"0x{code:02x}"


def _instructions() -> dict[int, Callable[[_Machine], None]]:
    table: dict[bytes, Callable[[_Machine], None]] = {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),  # framing only helps a reader of streams
        pickle.EMPTY_DICT: lambda m: m.stack.append({}),
        pickle.EMPTY_LIST: lambda m: m.stack.append([]),
        pickle.LONG1: lambda m: m.stack.append(
            int.from_bytes(m.take(m.number("<B")), "little", signed=True)
        ),
        pickle.MARK: _Machine.mark,
        pickle.TUPLE: _Machine.make_tuple,
        pickle.SETITEM: _Machine.set_item,
        pickle.SETITEMS: _Machine.set_items,
        pickle.APPEND: _Machine.append,
        pickle.APPENDS: _Machine.append_all,
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.GLOBAL: lambda m: m.push_global(m.line(), m.line()),
        pickle.STACK_GLOBAL: _Machine.stack_global,
        pickle.REDUCE: _Machine.reduce,
        pickle.BUILD: _Machine.build,
    }
    constants = ((pickle.NONE, None), (pickle.NEWTRUE, True), (pickle.NEWFALSE, False))
    for code, constant in (*constants, (pickle.EMPTY_TUPLE, ())):
        table[code] = lambda m, constant=constant: m.stack.append(constant)
    numbers = ((pickle.BININT, "<i"), (pickle.BININT1, "<B"), (pickle.BININT2, "<H"))
    for code, form in (*numbers, (pickle.BINFLOAT, ">d")):
        table[code] = lambda m, form=form: m.stack.append(m.number(form))
    for code, form in ((pickle.SHORT_BINUNICODE, "<B"), (pickle.BINUNICODE, "<I")):
        table[code] = lambda m, form=form: m.stack.append(m.text(m.number(form)))
    short = ((pickle.SHORT_BINBYTES, "<B"), (pickle.BINBYTES, "<I"))
    for code, form in (*short, (pickle.BINBYTES8, "<Q"), (pickle.BYTEARRAY8, "<Q")):
        table[code] = lambda m, form=form: m.stack.append(m.take(m.number(form)))
    for code, size in ((pickle.TUPLE1, 1), (pickle.TUPLE2, 2), (pickle.TUPLE3, 3)):
        table[code] = lambda m, size=size: m.make_tuple(size)
    for code, form in ((pickle.BINPUT, "<B"), (pickle.LONG_BINPUT, "<I")):
        table[code] = lambda m, form=form: m.put(m.number(form))
    for code, form in ((pickle.BINGET, "<B"), (pickle.LONG_BINGET, "<I")):
        table[code] = lambda m, form=form: m.get(m.number(form))
    return {code[0]: run for code, run in table.items()}


_INSTRUCTIONS = _instructions()


def loads(data: bytes) -> object:
    """The value that the pickle `data` describes; every `bytes` in it as a view onto `data`.

    Supported are dicts with text or integer keys, lists, tuples, None, booleans, numbers,
    text, bytes, and NumPy arrays and scalars of plain numbers (read-only views), as pickle
    protocols 3 to 5 of NumPy 1 and 2 write them. Raises `RefusedError` for anything else.
    """
    return _Machine(data).run()
