"""The matrices that methods with data work on: linear layers in blocks, and what goes into them.

A block is the outermost numbered module (`encoder.layer.3`, `model.layers.0`): what earlier blocks lost by quantization
is in the inputs of later ones, so blocks are worked on one after another. A linear layer outside of any is a block of
its own. Rows that are padding don't count.
"""
# ruff: noqa: TID253  these are torch modules: this file is imported only where a method works on them

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepipe.quantizers.modules import run_batch
from edgepipe.quantizers.texts import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Hold a block's linear layers."""

    name: str
    module: Any  # torch.nn.Module
    layers: Mapping[str, Any]  # name of the weight in the store → torch.nn.Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Say what goes into a layer, over all tokens of the calibration."""

    gram: Tensor  # [in, in] float32: the mean of x xᵀ
    magnitude: Tensor  # [in] float32: the mean of |x|


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Hold one call of a block: what it was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Batch


def blocks_of(module: Any, names: Collection[str]) -> list[Block]:
    """Return the blocks that hold the linear layers whose weights are called `names`, in the module's order."""
    found: dict[str, dict[str, Any]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and f"{path}.weight" in names:
            found.setdefault(_block_name(path), {})[f"{path}.weight"] = layer
    return [Block(name=name, module=module.get_submodule(name), layers=layers) for name, layers in found.items()]


def _block_name(path: str) -> str:
    """Return the path up to its first number, or all of it."""
    parts = path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: numbered + 1])


def kept_rows(x: Tensor, batch: Batch) -> Tensor:
    """Return x [rows, tokens, width] as [n, width] without padding; all of it where it has another shape."""
    for mask in (batch.attention_mask, batch.decoder_mask):
        if mask is not None and x.dim() == 3 and tuple(x.shape[:2]) == mask.shape:
            return x[torch.from_numpy(mask) > 0]
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def inputs_of(module: Any, block: Block, batches: Sequence[Batch]) -> dict[str, Inputs]:
    """Run the batches and return what goes into each layer of a block; a layer that no token reaches has no entry."""
    grams: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    last: list[Any] = [None, None, None]  # an input that several layers share is multiplied once
    current = batches[0]

    def watch(name: str, x: Tensor) -> None:
        if last[0] is not x:
            rows = kept_rows(x, current).float()
            last[:] = [x, rows.T @ rows, rows]
        _, gram, rows = last
        if len(rows):
            grams[name] = grams[name] + gram if name in grams else gram
            magnitudes[name] = magnitudes.get(name, 0) + rows.abs().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

    with contextlib.ExitStack() as stack:
        for name, layer in block.layers.items():
            hook = layer.register_forward_pre_hook(lambda _, given, name=name: watch(name, given[0]))
            stack.callback(hook.remove)
        for current in batches:
            run_batch(module, current)
    return {n: Inputs(gram=grams[n] / counts[n], magnitude=magnitudes[n] / counts[n]) for n in grams}


@torch.no_grad()
def calls_of(module: Any, block: Block, batches: Sequence[Batch]) -> list[Call]:
    """Run the batches and return every call of a block."""
    found: list[Call] = []
    current = batches[0]

    def watch(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args=args, kwargs=kwargs, batch=current))

    hook = block.module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        for current in batches:
            run_batch(module, current)
    finally:
        hook.remove()
    return found


@torch.no_grad()
def outputs_of(module: Any, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """Run the batches and return what every call of every block gave: its first tensor."""
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    with contextlib.ExitStack() as stack:
        for block in blocks:
            hook = block.module.register_forward_hook(
                lambda _module, _given, output, name=block.name: found[name].append(first_tensor(output))
            )
            stack.callback(hook.remove)
        for batch in batches:
            run_batch(module, batch)
    return found


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of what a module gave."""
    found = next(_tensors(output), None)
    assert found is not None, f"a block gave no tensor but {type(output).__name__}"
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


@torch.no_grad()
def put(layer: Any, values: Any) -> None:
    """Give a layer its quantized values [out, in], a numpy array or a tensor, so that later blocks see their errors."""
    layer.weight.data.copy_(torch.as_tensor(values))
