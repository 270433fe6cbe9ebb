"""Find a graph's constants again among the weights they came from, by what they hold.

    initializer equal to a weight              → the named weight weight/NAME
    initializer equal to a weight's transpose  → the view weight/NAME.T

Exporters rename: constant folding turns query.weight into onnx::MatMul_123, transposed. Values don't lie, so a constant
with a weight's name is believed only when it holds the same, and others are looked up by shape and digest. Constants
that are no weight stay.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import onnx_ir as ir

from edgepipe.graph.dialect import weight_input
from edgepipe.weights import WeightStore

_Shape = tuple[int, ...]


def name_weights(graph: ir.Graph, weights: WeightStore) -> tuple[int, int]:
    """Replace the constants of a graph that are weights by named weights; return how many by name, and by content.

    Each weight is read once or twice, one at a time. Of weights that hold the same, the first in the store stands.
    """
    index = _Index(weights)
    inputs: dict[str, ir.Value] = {}
    by_name = by_content = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
            continue  # a scalar is a setting, not a weight
        array = tensor.numpy().astype(np.float32)
        found = (weights[name].name, False) if name in weights and _holds(weights, name, array) else None
        by_name += found is not None
        if found is None:
            found = index.find(array)
            by_content += found is not None
        if found is None:
            continue
        view = weight_input(found[0], array.shape, transposed=found[1])
        kept = inputs.setdefault(view.name or "", view)
        value.replace_all_uses_with(kept)
        del graph.initializers[name]
    graph.inputs.extend(inputs.values())
    return by_name, by_content


def _holds(weights: WeightStore, name: str, array: np.ndarray) -> bool:
    """Say whether a weight holds exactly these values in this shape."""
    return weights[name].shape == array.shape and _digest(weights.float32(name)) == _digest(array)


def _digest(array: np.ndarray) -> bytes:
    """Hash values [any shape] float32; −0 counts as 0."""
    return hashlib.sha256((np.ascontiguousarray(array) + np.float32(0)).tobytes()).digest()


class _Index:
    """Look weights up by content; those of a shape are read when the first constant of that shape asks."""

    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights
        self._names: dict[_Shape, list[str]] = defaultdict(list)
        for name, weight in weights.items():
            self._names[weight.shape].append(name)
        self._known: dict[_Shape, dict[bytes, tuple[str, bool]]] = {}

    def find(self, array: np.ndarray) -> tuple[str, bool] | None:
        """Return the name of the weight that holds these values, and whether transposed; None when none does."""
        shape = array.shape
        if shape not in self._known:
            self._known[shape] = self._read(shape)
        return self._known[shape].get(_digest(array))

    def _read(self, shape: _Shape) -> dict[bytes, tuple[str, bool]]:
        found: dict[bytes, tuple[str, bool]] = {}
        for name in self._names[shape]:
            found.setdefault(_digest(self._weights.float32(name)), (name, False))
        if len(shape) == 2:
            for name in self._names.get((shape[1], shape[0]), ()):
                found.setdefault(_digest(self._weights.float32(name).T), (name, True))
        return found
