"""A graph of fixed shapes as passes edit it: nodes in order, constants by name, the shape of every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

Attribute = int | float | Sequence[int]


@dataclass(slots=True)
class Nodes:
    """Hold the nodes of a graph while a pass goes over them, and write new ones."""

    model: onnx.ModelProto
    constants: dict[str, np.ndarray] = field(init=False)  # initializers by name
    shapes: dict[str, tuple[int, ...]] = field(init=False)  # of every value that stood in the graph at first
    inputs: list[onnx.ValueInfoProto] = field(init=False)
    outputs: list[onnx.ValueInfoProto] = field(init=False)
    out: list[onnx.NodeProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.inputs, self.outputs = list(graph.input), list(graph.output)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        described = [*graph.input, *graph.value_info, *graph.output]
        self.shapes = {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in described}
        self.shapes |= {name: value.shape for name, value in self.constants.items()}

    def op(
        self, kind: str, inputs: Sequence[str], attributes: Mapping[str, Attribute] | None = None, *, output: str = ""
    ) -> str:
        """Append a node and return the name of its output, a new one where none is given."""
        output = output or f"{kind.lower()}.{len(self.out)}"
        node = onnx.helper.make_node(kind, list(inputs), [output], name=output)
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in (attributes or {}).items())
        self.out.append(node)
        return output

    def constant(self, array: np.ndarray, name: str) -> str:
        """Return the name of a constant, which is kept once."""
        held = self.constants.get(name)
        if held is not None and not (held.shape == array.shape and np.array_equal(held, array)):
            name = f"{name}.{len(self.out)}"
        self.constants[name] = array
        return name

    def sizes(self, *values: int) -> str:
        """Return the name of a constant shape."""
        return self.constant(np.array(values, np.int64), f"sizes.{'x'.join(map(str, values))}")

    def finish(self) -> onnx.ModelProto:
        """Return the model with the new nodes: only those that an output needs, every shape inferred anew."""
        graph = self.model.graph
        left = Counter(name for node in self.out for name in node.input)
        left.update(value.name for value in self.outputs)
        kept = []
        for node in reversed(self.out):
            if any(left[name] for name in node.output if name):
                kept.append(node)
            else:
                left.subtract(node.input)
        read = {name for node in kept for name in node.input}
        made = onnx.helper.make_graph(
            kept[::-1],
            graph.name,
            [value for value in self.inputs if value.name in read],
            self.outputs,
            [onnx.numpy_helper.from_array(v, name) for name, v in self.constants.items() if name in read],
        )
        model = onnx.helper.make_model(made, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def attributes_of(node: onnx.NodeProto) -> Mapping[str, Any]:
    """Return a node's attributes by name."""
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
