"""Pass: a float graph of fixed shapes → the same with 16-bit activations and 8-bit weights, as pairs of Q and DQ.

    x of any operator             →  DQ(Q(x)), uint16, the range seen over the calibration texts; norms and softmax too
    MatMul(x, W [k, n]) (+ bias)  →  Conv 1 × 1 with one int8 scale for each of the n channels, bias int32
    Gather(table, ids)            →  rows of a uint8 table, brought to 16 bits
    weights of norms              →  uint8, their biases int32
    other constants               →  uint16
    what only moves values        →  result on the grid of what it moves
    Where(mask, x, −3.4e38)       →  on the grid of x: the constant is its lowest level
    float inputs, new_key.i, new_value.i  →  16-bit levels as they are: an app moves a cache and computes nothing of it

The product is written as a convolution because the HTP takes a scale for each channel there and not in its MatMul; per
tensor, 8 bits cost MiniLM thirty times as much (docs/npu.md). The Transposes around it meet the layout the HTP wants,
and vanish in it. An 8-bit matrix that came with one scale a row keeps its codes. LayerNorm takes 8-bit weights only.
Sigmoid and Tanh have the grids that the HTP demands. Source: QNN's supported operations of the HTP backend, and
onnxruntime's quantization/execution_providers/qnn/quant_config.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.qnn.cached_attention import HIDDEN
from edgepipe.engines.qnn.nodes import Nodes
from edgepipe.engines.qnn.rotate import TURNED
from edgepipe.graph.dialect import weight_name
from edgepipe.numerics.grids import unpack
from edgepipe.runtime.npu_step import NEW, PAST, PAST_MASK
from edgepipe.weights import WeightStore

Range = tuple[float, float]

APART = "/"  # between the name of an operator's result and that of a node that helps it
_LEAST_SPAN = 1e-4  # of a range: what is always zero has a grid all the same
_MOST = {"uint16": 65535, "uint8": 255}
_MOVES = ("Reshape", "Transpose", "Slice", "Split", "GatherND", "Expand", "Unsqueeze", "Squeeze", "ReduceMax")
_NORMS = ("LayerNormalization", "RMSNormalization")
_DEMANDED = {"Sigmoid": (1 / 65536, 0), "Tanh": (1 / 32768, 32768)}  # scale and zero point at 16 bits
_AS_FLOAT = ("Clip",)  # whose bounds are numbers, not tensors


@dataclass(frozen=True, slots=True)
class Grid:
    """Say what a level means: value = scale · (level − zero)."""

    scale: np.float32
    zero: int
    dtype: str = "uint16"

    @classmethod
    def of(cls, low: float, high: float, dtype: str = "uint16") -> Grid:
        """Return the grid that reaches from `low` to `high`, and holds zero exactly."""
        low, high, most = min(low, 0.0), max(high, 0.0), _MOST[dtype]
        scale = max(high - low, _LEAST_SPAN) / most
        return cls(np.float32(scale), int(np.clip(round(-low / scale), 0, most)), dtype)

    def round(self, values: np.ndarray) -> np.ndarray:
        """Return the levels of values; what lies beyond the grid gets its last level."""
        low, high = (float(end - self.zero) * float(self.scale) for end in (0, _MOST[self.dtype]))
        levels = np.round(np.clip(values, low, high) / self.scale) + self.zero
        rounded: np.ndarray = np.clip(levels, 0, _MOST[self.dtype]).astype(self.dtype)
        return rounded


@dataclass(slots=True)
class _Pass:
    """Hold the graph that is written, and the grid and the name of everything that stands in it already."""

    nodes: Nodes
    ranges: Mapping[str, Range]
    weights: WeightStore
    floats: frozenset[str]
    grids: dict[str, Grid] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # value → what its readers are given

    def grid(self, node: onnx.NodeProto, name: str) -> Grid:
        """Return the grid of a node's result."""
        if node.op_type in _DEMANDED:
            scale, zero = _DEMANDED[node.op_type]
            return Grid(np.float32(scale), zero)
        if node.op_type in _MOVES:
            return self.grids[node.input[0]]
        if (other := self.beside_constant(node)) is not None:
            return other
        return Grid.of(*self.ranges[name])

    def given(self, name: str) -> None:
        """Let a float input of the graph be levels: a cache's on the grid of what is written to it."""
        grid = Grid.of(HIDDEN, 0.0) if name == PAST_MASK else self.grids[NEW + name.removeprefix(PAST)]
        self.grids[name] = grid
        self.names[name] = self.decode(name, name, grid, f"{name}{APART}rounded")

    def decode(self, levels: str, name: str, grid: Grid, output: str) -> str:
        """Return the result of a DequantizeLinear of levels on the grid of a value."""
        inputs = [levels, *self.parts(name, grid)]
        made = self.nodes.op("DequantizeLinear", inputs, output=output)
        self.nodes.out[-1].name = f"{name}{APART}rounded"
        return made

    def parts(self, name: str, grid: Grid) -> list[str]:
        """Return the names of a grid's scale and zero point as constants."""
        found = {"scale": np.array(grid.scale), "zero": np.array(grid.zero, grid.dtype)}
        return [self.nodes.constant(value, f"{name}{APART}{part}") for part, value in found.items()]

    def beside_constant(self, node: onnx.NodeProto) -> Grid | None:
        """Return the grid of what a Where puts a constant beside; None for anything else."""
        if node.op_type != "Where" or sum(name in self.nodes.constants for name in node.input[1:]) != 1:
            return None
        return next(self.grids[name] for name in node.input[1:] if name not in self.nodes.constants)

    def decoded(
        self, name: str, levels: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int | None = None
    ) -> str:
        """Return a constant behind its DequantizeLinear, made once."""
        made = f"{name}{APART}decoded"
        if not any(made in node.output for node in self.nodes.out):
            parts = {"levels": levels, "scale": scale, "zero": zero}
            inputs = [self.nodes.constant(value, f"{name}{APART}{part}") for part, value in parts.items()]
            self.nodes.op("DequantizeLinear", inputs, {} if axis is None else {"axis": axis}, output=made)
        return made

    def constant(self, name: str, dtype: str) -> str:
        """Return a float constant on a grid of its own."""
        values = self.nodes.constants[name]
        grid = self.grids[name] = Grid.of(float(values.min()), float(values.max()), dtype)
        zero = np.array(grid.zero, dtype)
        return self.decoded(f"{name}{APART}{dtype}", grid.round(values), np.array(grid.scale), zero)

    def rounded(self, raw: str, name: str, grid: Grid) -> None:
        """Let `name` be the value `raw` rounded to a grid."""
        self.grids[name] = grid
        is_output = any(name == value.name for value in self.nodes.outputs)
        as_levels = is_output and name.startswith(NEW)
        inputs = [raw, *self.parts(name, grid)]
        levels = self.nodes.op("QuantizeLinear", inputs, output=name if as_levels else f"{name}{APART}levels")
        self.nodes.out[-1].name = f"{name}{APART}levels"
        decoded = name if is_output and not as_levels else f"{name}{APART}rounded"
        self.names[name] = self.decode(levels, name, grid, decoded)


def to_qdq(plain: onnx.ModelProto, ranges: Mapping[str, Range], weights: WeightStore) -> onnx.ModelProto:
    """Return a plain graph (plain_attention.py) on grids; `ranges` are those of its float values, by name.

    A node keeps the name of its result; nodes that help it are called NAME/….
    """
    nodes = Nodes(plain)
    described = [*plain.graph.value_info, *plain.graph.output]
    floats = {v.name for v in described if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    one = _Pass(nodes, ranges, weights, frozenset(floats))
    moved = {value.name for value in plain.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    nodes.inputs = [_levels(value) if value.name in moved else value for value in nodes.inputs]
    nodes.outputs = [_levels(value) if value.name.startswith(NEW) else value for value in nodes.outputs]
    readers = Counter(name for node in plain.graph.node for name in node.input)
    following = {name: node for node in plain.graph.node for name in node.input}
    joined: set[str] = set()  # results of Adds that a convolution has as its bias
    for node in plain.graph.node:
        if node.output[0] in joined:
            continue
        for name in sorted(moved.intersection(node.input)):
            moved.remove(name)
            one.given(name)
        if node.op_type == "MatMul" and nodes.constants.get(node.input[1], np.empty(0)).ndim == 2:
            after = following.get(node.output[0]) if readers[node.output[0]] == 1 else None
            bias = _bias(nodes, node, after)
            if bias and after is not None:
                joined.add(after.output[0])
            _convolution(one, node, bias, after.output[0] if bias and after is not None else node.output[0])
        elif node.op_type == "Gather" and node.input[0] in nodes.constants and node.output[0] in floats:
            _rows(one, node)
        else:
            _operator(one, node)
    return nodes.finish()


def _levels(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Return the description of a value whose levels go in or out."""
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.UINT16, shape)


def _operator(one: _Pass, node: onnx.NodeProto) -> None:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = node.output[0]
    del copy.input[:]
    copy.input.extend(_given(one, node, place, name) for place, name in enumerate(node.input))
    for place, name in enumerate(node.output):
        if name in one.floats:
            copy.output[place] = f"{name}{APART}raw"
    one.nodes.out.append(copy)
    for raw, name in zip(copy.output, node.output, strict=True):
        if name in one.floats:
            one.rounded(raw, name, one.grid(node, name))


def _given(one: _Pass, node: onnx.NodeProto, place: int, name: str) -> str:
    """Return what a node reads in place of a value."""
    values = one.nodes.constants.get(name)
    if values is None:
        return one.names.get(name, name)
    if values.dtype != np.float32 or node.op_type in _AS_FLOAT:
        return name
    if node.op_type in _NORMS and place == 2:
        scale = np.float32(one.grids[node.input[0]].scale * one.grids[node.input[1]].scale)
        levels = np.round(values / scale).astype(np.int32)
        return one.decoded(f"{name}{APART}int32", levels, np.array(scale), np.array(0, np.int32))
    if (grid := one.beside_constant(node)) is not None:
        given = f"{name}{APART}{node.output[0]}"
        return one.decoded(given, grid.round(values), np.array(grid.scale), np.array(grid.zero, grid.dtype))
    return one.constant(name, "uint8" if node.op_type in _NORMS and place == 1 else "uint16")


def _rows(one: _Pass, node: onnx.NodeProto) -> None:
    """Write a Gather from a table: 8-bit rows where the table is a weight, then 16 bits on the same range."""
    table, name = node.input[0], node.output[0]
    small = weight_name(table.removeprefix(TURNED)) is not None
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    copy.input[0] = one.constant(table, "uint8" if small else "uint16")
    copy.output[0] = f"{name}{APART}raw"
    one.nodes.out.append(copy)
    if not small:
        one.rounded(copy.output[0], name, one.grids[table])
        return
    one.rounded(copy.output[0], f"{name}{APART}8-bit", one.grids[table])
    values = one.nodes.constants[table]
    one.rounded(one.names[f"{name}{APART}8-bit"], name, Grid.of(float(values.min()), float(values.max())))


def _bias(nodes: Nodes, product: onnx.NodeProto, after: onnx.NodeProto | None) -> str:
    """Return the name of the vector that is all that is done with a product; empty where there is none."""
    if after is None or after.op_type != "Add":
        return ""
    other = next((name for name in after.input if name != product.output[0]), "")
    width = nodes.constants[product.input[1]].shape[1]
    return other if other in nodes.constants and nodes.constants[other].shape == (width,) else ""


def _convolution(one: _Pass, node: onnx.NodeProto, bias: str, name: str) -> None:
    """Write x [… k] · W [k, n] + bias as a convolution over [1, k, 1, rows], with the result `name`."""
    nodes, x = one.nodes, node.input[0]
    shape, (width, channels) = nodes.shapes[x], nodes.constants[node.input[1]].shape
    rows, grid = int(np.prod(shape[:-1])), one.grids[x]
    codes, scale = _codes(one, node.input[1])
    zeros = np.zeros(channels, np.int8)
    kernel = one.decoded(f"{node.input[1]}{APART}int8", codes[:, :, None, None], scale, zeros, axis=0)
    inputs = [kernel]
    if bias:
        steps = (scale * grid.scale).astype(np.float32)
        levels = np.round(nodes.constants[bias] / steps).astype(np.int32)
        inputs.append(one.decoded(f"{bias}{APART}{name}", levels, steps, np.zeros(channels, np.int32), axis=0))
    given, result = one.names.get(x, x), Grid.of(*one.ranges[name])

    def step(kind: str, inputs: list[str], grid: Grid, end: str, attributes: dict[str, tuple[int, ...]]) -> str:
        one.rounded(nodes.op(kind, inputs, attributes, output=f"{end}{APART}{kind.lower()}"), end, grid)
        return one.names[end]

    given = step("Reshape", [given, nodes.sizes(1, 1, rows, width)], grid, f"{name}{APART}row", {})
    given = step("Transpose", [given], grid, f"{name}{APART}inputs", {"perm": (0, 3, 1, 2)})
    given = step("Conv", [given, *inputs], result, f"{name}{APART}channels", {"kernel_shape": (1, 1)})
    given = step("Transpose", [given], result, f"{name}{APART}rows", {"perm": (0, 2, 3, 1)})
    step("Reshape", [given, nodes.sizes(*shape[:-1], channels)], result, name, {})


def _codes(one: _Pass, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the int8 codes [n, k] of a matrix W [k, n] and the scale [n] of every channel."""
    stored = weight_name(name)
    if stored is not None and stored[1]:
        tensor = one.weights.load(stored[0])
        if isinstance(tensor, QuantizedTensor) and tensor.has_integer_rows and tensor.column_scale is None:
            codes = unpack(np.asarray(tensor.codes), 8)[:, : tensor.shape[1]].astype(np.int16) - 128
            return codes.astype(np.int8), np.asarray(tensor.scale, np.float32)[:, 0]
    values = one.nodes.constants[name].T  # [n, k]
    scale = np.maximum(np.abs(values).max(1), np.float32(1e-8)) / np.float32(127)
    return np.round(values / scale[:, None]).astype(np.int8), scale.astype(np.float32)
