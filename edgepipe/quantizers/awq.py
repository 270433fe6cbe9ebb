"""AWQ on a torch module: find what can take a scale, choose scales and ranges (numerics/awq.py), change both sides.

    x = norm(h) or linear(h);  y = W·x      →      x/t from a norm or linear divided by t;  (W·diag(t))·(x/t)

What can take 1/t isn't looked up by name: a norm or linear layer of the block is divided by random t, the layers behind
it multiplied, and where the block still gives what it gave, the pair is one. That holds for a norm before its
projections, for values before the output projection of attention, for the linear half of a gated MLP; it fails, as it
must, for a norm whose result is also added later (BERT) and behind an activation.
"""
# ruff: noqa: TID253  these are torch modules: this file is imported only where the method is asked for

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.awq import choose_scales, cut
from edgepipe.numerics.grids import Grid, dequantize
from edgepipe.quantizers.layers import Block, Call, Inputs, calls_of, first_tensor, inputs_of, put
from edgepipe.quantizers.texts import Batch

_SAME = 0.01  # of what one side alone changes: float32's rounding is far below, what is no pair changes as much
_SEED = 11  # of the t that pairs are tried with


def spare(
    module: Any,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    grids: Mapping[str, Grid],
    *,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, QuantizedTensor], dict[str, np.ndarray], int]:
    """Return the matrices of all blocks on their grids, the vectors that took scales, and how many matrices got one.

    The module holds all of these values afterwards.
    """
    found: dict[str, QuantizedTensor] = {}
    vectors: dict[str, np.ndarray] = {}
    scaled = 0
    for number, block in enumerate(blocks):
        progress(number, len(blocks))
        inputs = inputs_of(module, block, batches)
        calls = calls_of(module, block, batches[:1])
        pairs = list(_pairs(block, calls[0])) if calls else []
        for names, absorber in pairs:
            scales = _scales(block, names, inputs, grids)
            _divide(absorber, scales)
            for name in names:
                block.layers[name].weight.data.mul_(scales)
                inputs[name] = _divided(inputs[name], scales)
            scaled += len(names)
        vectors |= _vectors(block, [absorber for _, absorber in pairs])
        for name, layer in block.layers.items():
            weight = layer.weight.data.numpy()
            gram = inputs[name].gram.numpy() if name in inputs else np.eye(weight.shape[1], dtype=np.float32)
            found[name] = cut(weight, gram, grids[name])
            put(layer, dequantize(found[name]))
    return found, vectors, scaled


def _scales(block: Block, names: Sequence[str], inputs: Mapping[str, Inputs], grids: Mapping[str, Grid]) -> Tensor:
    first = inputs[names[0]]
    weights = [block.layers[name].weight.data.numpy() for name in names]
    return torch.from_numpy(
        choose_scales(weights, first.gram.numpy(), first.magnitude.numpy(), [grids[name] for name in names])
    )


def _divided(inputs: Inputs, scales: Tensor) -> Inputs:
    return Inputs(gram=inputs.gram / scales / scales[:, None], magnitude=inputs.magnitude / scales)


def _divide(absorber: Any, scales: Tensor) -> None:
    """Divide what a norm or linear layer gives by scales [out]."""
    weight = absorber.weight.data
    weight.div_(scales if weight.dim() == 1 else scales[:, None])
    if getattr(absorber, "bias", None) is not None:
        absorber.bias.data.div_(scales)


def _vectors(block: Block, absorbers: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return the vectors of some modules by their names in the model: weights of norms, biases."""
    found = {}
    for path, part in block.module.named_modules():
        if any(part is one for one in absorbers):
            for name, value in part.named_parameters(recurse=False):
                if value.dim() == 1:
                    found[".".join(filter(None, (block.name, path, name)))] = value.data.numpy().copy()
    return found


def _pairs(block: Block, call: Call) -> Iterator[tuple[list[str], Any]]:
    """Yield layers that share their inputs with the module that can take what they are multiplied by."""
    taken: list[Any] = []
    for names in _siblings(block, call):
        width = block.layers[names[0]].in_features
        layers = [block.layers[name] for name in names]
        for candidate in _candidates(block, width):
            if not any(candidate is one for one in (*layers, *taken)) and _is_pair(block, call, layers, candidate):
                taken.append(candidate)
                yield names, candidate
                break


def _candidates(block: Block, width: int) -> list[Any]:
    """Return the norms of a block over `width`, and its layers that are quantized and give as much."""
    known = [layer for layer in block.layers.values() if layer.out_features == width]
    norms = [
        part
        for part in block.module.modules()
        if tuple(getattr(getattr(part, "weight", None), "shape", ())) == (width,) and not isinstance(part, nn.Linear)
    ]
    return [*norms, *known]


@torch.no_grad()
def _siblings(block: Block, call: Call) -> list[list[str]]:
    """Return the names of layers in sets that are given the very same tensor."""
    seen: list[tuple[Tensor, list[str]]] = []

    def watch(name: str, x: Tensor) -> None:
        for one, names in seen:
            if one is x:
                names.append(name)
                return
        seen.append((x, [name]))

    with contextlib.ExitStack() as stack:
        for name, layer in block.layers.items():
            hook = layer.register_forward_pre_hook(lambda _, given, name=name: watch(name, given[0]))
            stack.callback(hook.remove)
        block.module(*call.args, **call.kwargs)
    counts = [name for _, names in seen for name in names]
    return [names for _, names in seen if all(counts.count(name) == 1 for name in names)]


@torch.no_grad()
def _is_pair(block: Block, call: Call, layers: Sequence[Any], candidate: Any) -> bool:
    """Say whether a block gives the same when some layers are multiplied by t and a candidate is divided by it.

    The measure is what multiplying alone changes: a residual stream may be large beside all that a layer adds to it.
    """
    generator = torch.Generator().manual_seed(_SEED)
    scales = torch.rand(layers[0].in_features, generator=generator) * 1.5 + 0.5
    kept = [(part, part.data.clone()) for one in (candidate, *layers) for part in one.parameters(recurse=False)]

    def output() -> Tensor:
        return first_tensor(block.module(*call.args, **call.kwargs))

    try:
        before = output()
        for layer in layers:
            layer.weight.data.mul_(scales)
        alone = (output() - before).abs().mean()
        _divide(candidate, scales)
        both = (output() - before).abs().mean()
    finally:
        for part, value in kept:
            part.data.copy_(value)
    return bool(both <= _SAME * alone) and bool(alone > 0)
