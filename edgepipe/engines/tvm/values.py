"""The values of a graph while it is converted: tensors of Relax, named weights, and what is known before it runs.

A `Known` holds constants, or integers that follow from the sizes of the inputs (an ONNX graph computes its shapes in
the graph); those are numpy arrays of Python numbers and TVM's expressions, so numpy's own indexing does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.sym import Analyzer

Size = Any  # int, or an expression of TVM


@dataclass(frozen=True, slots=True)
class Known:
    """Hold a value that is known when the graph is converted."""

    array: np.ndarray  # numbers, or dtype object: sizes

    @property
    def symbolic(self) -> bool:
        """Say whether it depends on the sizes of the inputs."""
        return self.array.dtype == object


@dataclass(frozen=True, slots=True)
class Tensor:
    """Hold a value that exists when the library runs."""

    expr: Any  # relax.Var
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Weight:
    """Name a weight of the store, or its transposed view."""

    name: str
    transposed: bool


Value = Known | Tensor | Weight


def size(value: Any) -> Size:
    """Return a size as a Python number where it is one."""
    if isinstance(value, int | np.integer):
        return int(value)
    value = Analyzer().simplify(value)
    return int(value) if isinstance(value, tirx.IntImm) else value


def known_sizes(values: list[Size]) -> Known:
    """Return sizes as a vector of int64; numbers stay numbers."""
    if all(isinstance(value, int) for value in values):
        return Known(np.array(values, np.int64))
    array = np.empty(len(values), object)
    array[:] = values
    return Known(array)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or the default where the node has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


# ---------------------------------------------------------------------------------------------------------------------
# operators on sizes


def _axes(node: ir.Node, inputs: list[np.ndarray]) -> tuple[int, ...] | None:
    return tuple(int(axis) for axis in inputs[1]) if len(inputs) > 1 else None


def _unsqueeze(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.expand_dims(inputs[0], _axes(node, inputs) or ())


def _slice(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    starts, ends = inputs[1], inputs[2]
    axes = inputs[3] if len(inputs) > 3 else np.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 else np.ones(len(starts), np.int64)
    index: list[slice] = [slice(None)] * inputs[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return inputs[0][tuple(index)]


_ON_SIZES: Mapping[str, Callable[[ir.Node, list[np.ndarray]], np.ndarray]] = {
    "Add": lambda node, x: x[0] + x[1],
    "Sub": lambda node, x: x[0] - x[1],
    "Mul": lambda node, x: x[0] * x[1],
    "Div": lambda node, x: x[0] // x[1],
    "Cast": lambda node, x: x[0],
    "Concat": lambda node, x: np.concatenate(x, axis=attribute(node, "axis")),
    "Gather": lambda node, x: np.take(x[0], x[1].astype(np.int64), axis=attribute(node, "axis", 0)),
    "Reshape": lambda node, x: x[0].reshape([int(n) for n in x[1]]),
    "Slice": _slice,
    "Squeeze": lambda node, x: np.squeeze(x[0], _axes(node, x)),
    "Unsqueeze": _unsqueeze,
}


_MOVES = ("Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")  # whose other inputs say where, not what


def on_sizes(node: ir.Node, inputs: list[Known]) -> Known | None:
    """Compute a node on sizes; None when it isn't among the operators that are done on them."""
    compute = _ON_SIZES.get(node.op_type)
    if compute is None or (node.op_type in _MOVES and any(value.symbolic for value in inputs[1:])):
        return None
    found = np.asarray(compute(node, [value.array for value in inputs]), object)
    flat = [size(value) for value in found.reshape(-1)]
    if all(isinstance(value, int) for value in flat):
        return Known(np.array(flat, np.int64).reshape(found.shape))
    array = np.empty(len(flat), object)
    array[:] = flat
    return Known(array.reshape(found.shape))
