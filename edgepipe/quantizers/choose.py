"""Run one method over the matrices that a plan puts on grids: the module, the texts, the method, and what it found.

    gptq        numerics/gptq.py        data     columns make up for each other's errors
    awq         numerics/awq.py         data     scales between layers, ranges of groups
    autoround   auto-round              data     rounding and ranges are learned, a block at a time
    hqq         neural-compressor       none     zero points

Methods with data work on linear layers; what isn't one (a table, GPT-2's transposed Conv1D) is left to
round-to-nearest. The model is in memory as float32 while they work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgepipe.artifacts import QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError, TargetError
from edgepipe.numerics.grids import Grid, check_values, dequantize, pin_zeros
from edgepipe.quantizers import WITHOUT_DATA
from edgepipe.quantizers.texts import Calibration, batches, check_calibration
from edgepipe.store import versions

_PACKAGES = {"hqq": ("neural_compressor", "neural-compressor-pt"), "autoround": ("auto_round", "auto-round")}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Hold what a method found."""

    tensors: Mapping[str, QuantizedTensor]  # by name of the weight
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32, changed so that the model stays itself
    notes: tuple[str, ...] = ()


def check_method(method: str, model: TorchModel, calibration: Calibration) -> None:
    """Refuse, before any work, a method whose package isn't there, and texts that can't be had."""
    require(method)
    if method not in WITHOUT_DATA:
        check_calibration(model.info, calibration)


def require(method: str) -> None:
    """Raise TargetError when the package a method comes from isn't there; the sentence names the extra."""
    if method in _PACKAGES:
        module, package = _PACKAGES[method]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TargetError(
                f"quantize.method={method} needs the package {package} ({error}): pip install 'edgepipe[quantize]'"
            ) from error


def versions_of(method: str) -> dict[str, str]:
    """Return the versions of the packages that decide a method's result, beside those that decide any."""
    return versions((_PACKAGES[method][1],)) if method in _PACKAGES else {}


def choose_codes(
    model: TorchModel,
    grids: Mapping[str, Grid],
    method: str,
    calibration: Calibration,
    *,
    seed: int,
    progress: Progress,
) -> Found:
    """Return the tensors named in `grids` on those grids, as far as the method works on them.

    Raises ConfigError and TargetError as `check_method` does, StageError for weights whose values no grid holds.
    """
    check_method(method, model, calibration)
    for name, grid in grids.items():
        try:
            check_values(model.weights.float32(name), grid.bits)
        except ValueError as error:
            raise StageError(f"{name} cannot be quantized: {error}") from error
    if method == "hqq":
        found = _without_data(model, grids, progress)
    else:
        found = _with_data(model, grids, method, calibration, seed, progress)
    return replace(found, tensors={name: _masked(value, model, name) for name, value in found.tensors.items()})


def _masked(value: QuantizedTensor, model: TorchModel, name: str) -> QuantizedTensor:
    """Return a tensor that is zero where the weight was: pruned weights stay pruned, whatever a method learned."""
    zeros = model.weights.float32(name) == 0
    return pin_zeros(value, zeros) if zeros.any() else value


def _without_data(model: TorchModel, grids: Mapping[str, Grid], progress: Progress) -> Found:
    from edgepipe.quantizers.hqq import fit

    tensors = {}
    for done, (name, grid) in enumerate(grids.items()):
        progress(name, done, len(grids))
        tensors[name] = fit(model.weights.float32(name), grid)
    return Found(tensors=tensors)


def _with_data(
    model: TorchModel, grids: Mapping[str, Grid], method: str, calibration: Calibration, seed: int, progress: Progress
) -> Found:
    from edgepipe.quantizers.layers import blocks_of
    from edgepipe.quantizers.modules import module_of

    module = module_of(model)
    found = batches(model, calibration, seed=seed, module=module, progress=progress)
    blocks = blocks_of(module, grids)
    layers = sum(len(block.layers) for block in blocks)
    if not blocks:
        raise ConfigError(f"quantize.method={method}: {model.info.name} has no linear layer to work on: take rtn")
    tokens = sum(batch.tokens for batch in found)
    rows = sum(len(batch.input_ids) for batch in found)
    said = f"{method}: {layers} matrices in {len(blocks)} blocks looked at {rows} texts of {tokens:,} tokens"
    if method == "autoround":
        from edgepipe.quantizers.autoround import learn

        tell = _told(progress, "autoround learns to round")
        return Found(tensors=learn(module, blocks, found, grids, seed=seed, progress=tell), notes=(said,))
    if method == "awq":
        from edgepipe.quantizers.awq import spare

        tensors, vectors, scaled = spare(module, blocks, found, grids, progress=_told(progress, "awq"))
        return Found(tensors=tensors, vectors=vectors, notes=(f"{said}; {scaled} of them got scales",))
    return Found(tensors=_gptq(module, blocks, found, grids, _told(progress, "gptq")), notes=(said,))


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _gptq(
    module: Any, blocks: Any, found: Any, grids: Mapping[str, Grid], progress: Callable[[int, int], None]
) -> dict[str, QuantizedTensor]:
    """Return all blocks' matrices, each block with the inputs that the quantized ones before it give."""
    from edgepipe.numerics.gptq import compensate
    from edgepipe.quantizers.layers import inputs_of, put

    tensors: dict[str, QuantizedTensor] = {}
    total = sum(len(block.layers) for block in blocks)
    for block in blocks:
        inputs = inputs_of(module, block, found)
        for name, layer in block.layers.items():
            progress(len(tensors), total)
            if name in inputs:
                tensors[name] = compensate(layer.weight.data.numpy(), inputs[name].gram.numpy(), grids[name])
                put(layer, dequantize(tensors[name]))
    return tensors
