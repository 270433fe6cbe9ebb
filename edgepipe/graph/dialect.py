"""The portable dialect: standard ONNX operators (opset 23) whose large weights are *named*, not contained.

A weight is a graph input called `weight/NAME` (as stored, [out, in]) or `weight/NAME.T` (the transposed view a MatMul
multiplies by). NAME is an entry, or an alias, of the model's `WeightStore`; a tied embedding and head are two views of
one entry. Everything else that is small (inverse frequencies, shapes, scalars) is an ordinary initializer.

Operators in use: Gather, MatMul, Add, Mul, Sigmoid, Gelu, Tanh, RMSNormalization, RotaryEmbedding, Attention (with past
and present), Reshape, GatherND and, for windowed attention, the few that make a mask. docs/dialect.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and whole Attention
_PREFIX = "weight/"
_TRANSPOSED = ".T"

Dims = Sequence[int | str]
Attribute = int | float | str | Sequence[int]


def weight_name(value_name: str) -> tuple[str, bool] | None:
    """Split a graph input's name into (store name, is transposed view); None when it isn't a weight."""
    if not value_name.startswith(_PREFIX):
        return None
    name = value_name.removeprefix(_PREFIX)
    return name.removesuffix(_TRANSPOSED), name.endswith(_TRANSPOSED)


def weight_input(name: str, shape: Dims, *, transposed: bool = False) -> ir.Value:
    """Return the graph input that names a weight of the store; `shape` is the shape this view has."""
    full = _PREFIX + name + (_TRANSPOSED if transposed else "")
    return ir.Value(name=full, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


class GraphBuilder:
    """Collect nodes, inputs and named weights, then emit one graph of the dialect."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tape = Tape()
        self._inputs: dict[str, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Declare a graph input; a string in `shape` is a symbolic dimension."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs[name] = value
        return value

    def weight(self, name: str, shape: Dims, *, transposed: bool = False) -> ir.Value:
        """Name a weight of the store; `shape` is the shape this view has."""
        value = weight_input(name, shape, transposed=transposed)
        return self._weights.setdefault(value.name or "", value)

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """Embed a small constant, once however often it is asked for."""
        array = np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        notes: dict[str, str] | None = None,
    ) -> ir.Value:
        """Append a node with one output and return that output."""
        return self._tape.op(kind, list(inputs), dict(attributes or {}), metadata_props=notes)

    def op_multi(
        self, kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Attribute], outputs: int
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs and return them."""
        return self._tape.op_multi_out(kind, list(inputs), dict(attributes), num_outputs=outputs)

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Dims) -> None:
        """Make `value` a graph output called `name`."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def finish(self) -> bytes:
        """Return the serialized model, checked by onnx."""
        graph = ir.Graph(
            inputs=[*self._inputs.values(), *self._weights.values()],
            outputs=self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=self.name,
        )
        proto = ir.to_proto(ir.Model(graph, ir_version=10, producer_name="edgepipe"))
        onnx.checker.check_model(proto)
        return bytes(proto.SerializeToString(deterministic=True))
