"""The naive reference: the whole model, with what pruning removes zeroed in the matrices that would have read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgepipe.artifacts import TorchModel
from edgepipe.pruning.families import anatomy_of
from edgepipe.pruning.importance import Kept
from edgepipe.weights import held_weight


def zeroed(model: TorchModel, kept: Sequence[Kept]) -> TorchModel:
    """Return a model of the same shapes in which removed channels, groups and layers add nothing."""
    changed: dict[str, np.ndarray] = {}
    for stack, own in zip(anatomy_of(model).stacks, kept, strict=True):
        outputs = [*stack.attentions.items(), ("ffn", stack.ffn_output)]
        for layer in range(stack.layers):
            for what, matrix in outputs:
                name = f"{stack.prefix}{layer}.{matrix}"
                value = np.array(model.weights.float32(name))
                if layer not in own.layers:
                    value[:] = 0
                    bias = name.removesuffix("weight") + "bias"
                    if bias in model.weights:
                        changed[bias] = np.zeros(model.weights[bias].shape, np.float32)
                else:
                    keeps = own.ffn[layer] if what == "ffn" else own.groups[layer, what]
                    units = stack.ffn if what == "ffn" else stack.kv_heads
                    for unit in range(units):
                        if unit not in keeps:
                            width = value.shape[1] // units
                            value[:, unit * width : (unit + 1) * width] = 0
                changed[name] = value
    return with_values(model, changed)


def with_values(model: TorchModel, values: Mapping[str, np.ndarray]) -> TorchModel:
    """Return a model with other values."""
    weights = {name: held_weight(name, value) for name, value in values.items()}
    return dataclasses.replace(model, weights=model.weights.replace(weights))
