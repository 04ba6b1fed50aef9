"""Writes an ONNX graph node by node; parameters are named once, and stored in a separate file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the first with GELU; onnxruntime 1.17 or newer supports it
IR_VERSION = 9


class Stored(NamedTuple):
    """The place of one parameter in the file of weights."""

    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Weights:
    """The weights that all graphs share, in one file.

    Args:
        dtype: float32 or float16, of `add` without an explicit dtype.
    """

    def __init__(self, file_name: str, dtype: str):
        self.file_name = file_name
        self._dtype = np.dtype(dtype)
        self._stored: dict[str, Stored] = {}
        self._bytes = bytearray()

    def add(self, name: str, array: np.ndarray, *, exact: bool = False) -> None:
        """Stores an array under a name; `exact`: in float32 regardless of the dtype."""
        dtype = np.dtype("float32") if exact else self._dtype
        if name in self._stored:
            return
        numbers = np.ascontiguousarray(array, dtype=dtype)
        self._bytes += b"\0" * (-len(self._bytes) % 64)
        self._stored[name] = Stored(len(self._bytes), numbers.nbytes, numbers.shape, dtype)
        self._bytes += numbers.tobytes()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        """Of each weight: its offset in bytes, its shape and its dtype."""
        return {
            name: {"offset": one.offset, "shape": list(one.shape), "dtype": str(one.dtype)}
            for name, one in self._stored.items()
        }

    @property
    def data(self) -> bytes:
        return bytes(self._bytes)


class Nodes:
    """The nodes of one graph. A method adds one node and returns the name of its output."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._parameters: dict[str, str] = {}
        self._constants: dict[bytes, str] = {}

    def __call__(self, op: str, *inputs, **attributes) -> str:
        """One node with one output. An input is a name, or an array or number, a constant."""
        return self.several(op, 1, *inputs, **attributes)[0]

    def several(self, op: str, outputs: int, *inputs, **attributes) -> list[str]:
        """One node with several outputs."""
        number = len(self._nodes)
        names = [f"{op.lower()}_{number}_{i}" for i in range(outputs)]
        node = helper.make_node(op, [self._name(i) for i in inputs], names, **attributes)
        self._nodes.append(node)
        return names

    def parameter(self, name: str) -> str:
        """The parameter in float32."""
        if name not in self._parameters:
            stored = self._weights[name]
            kind = helper.np_dtype_to_tensor_dtype(stored.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=stored.shape)
            tensor.data_location = TensorProto.EXTERNAL
            where = {
                "location": self._weights.file_name,
                "offset": stored.offset,
                "length": stored.length,
            }
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
            exact = stored.dtype == np.float32
            self._parameters[name] = name if exact else self("Cast", name, to=TensorProto.FLOAT)
        return self._parameters[name]

    def _name(self, value) -> str:
        return value if isinstance(value, str) else self._constant(np.asarray(value))

    def _constant(self, array: np.ndarray) -> str:
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = str((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, np.array(shape, np.int64))

    def transpose(self, x: str, *order: int) -> str:
        return self("Transpose", x, perm=order)

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        where = (np.array([n], np.int64) for n in (start, stop, axis))
        return self("Slice", x, *where)

    def add(self, *terms) -> str:
        return self._fold("Add", terms)

    def mul(self, *factors) -> str:
        return self._fold("Mul", factors)

    def _fold(self, op: str, inputs: Sequence) -> str:
        found, *rest = inputs
        for one in rest:
            found = self(op, found, one)
        return found

    def model(
        self,
        name: str,
        inputs: dict[str, tuple[np.dtype, tuple]],
        outputs: dict[str, tuple[str, tuple]],
        notes: dict[str, str],
    ) -> onnx.ModelProto:
        """The graph as a model.

        Args:
            inputs: dtype and shape by name; a dynamic axis is a string.
            outputs: by name, the node's output and the shape; all float32.
            notes: the model's metadata.
        """
        for output, (source, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [source], [output]))
        take = [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(np.dtype(d)), s)
            for key, (d, s) in inputs.items()
        ]
        give = [
            helper.make_tensor_value_info(key, TensorProto.FLOAT, shape)
            for key, (_, shape) in outputs.items()
        ]
        graph = helper.make_graph(
            self._nodes, name, take, give, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cwm_jax"
        )
        helper.set_model_props(model, notes)
        return model
