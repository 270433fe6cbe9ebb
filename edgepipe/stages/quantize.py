"""Quantize: put every weight matrix on an integer grid, or keep the grid it came on.

Round-to-nearest per group (numerics/grids.py), or lossless import: a tensor that already lies on a grid no wider than
asked keeps its codes, scales and minima. `bits` speaks of the layers; embedding and output head have their own dial,
because they are gathered from and multiplied once, and lose more per bit (docs/quantize.md has the figures).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepipe.artifacts import Context, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError
from edgepipe.numerics.gguf_blocks import GRIDS
from edgepipe.numerics.grids import dequantize, quantized_nbytes, round_to_nearest
from edgepipe.weights import Value, Weight

BITS = (2, 4, 8, 16)
GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Say which grid one tensor goes on."""

    bits: int
    group: int
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Options of the stage `quantize`."""

    bits: int = 4  # of the layers' matrices: 2, 4, 8, or 16 (kept in 16-bit floats)
    embedding_bits: int = 0  # of embedding and output head: 2, 4, 8, 16; 0 means 8, or 16 when bits is 16
    group: int = 32  # elements of a row that share a scale: 16, 32, 64, 128
    symmetric: bool = True  # false adds integer zero points, one a group
    import_: bool = True  # keep the grid of a source that lies on one no wider than asked (bits below 16)
    overrides: tuple[str, ...] = ()  # "PATTERN=BITS" or "PATTERN=BITS/GROUP", PATTERN a glob over tensor names

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.bits not in BITS:
            raise ConfigError(f"quantize.bits: expected one of 2, 4, 8, 16, got {self.bits}")
        if self.embedding_bits not in (0, *BITS):
            raise ConfigError(f"quantize.embedding_bits: expected one of 2, 4, 8, 16, got {self.embedding_bits}")
        if self.group not in GROUPS:
            raise ConfigError(f"quantize.group: expected one of {', '.join(map(str, GROUPS))}, got {self.group}")
        for text in self.overrides:
            parse_override(text, self)

    def check(self, model: TorchModel) -> None:
        """Refuse overrides that match no tensor."""
        patterns = {parse_override(text, self)[0] for text in self.overrides}
        unmatched = sorted(p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in model.weights))
        if unmatched:
            raise ConfigError(f"quantize.overrides: no tensor matches {', '.join(unmatched)}")

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with every matrix on the grid the plan gives it; values are computed when they are read."""
        self.check(model)
        changed: dict[str, Weight] = {}
        imported = narrower = 0
        for name in model.weights:
            weight = model.weights[name]
            grid = self.plan(weight, model.info.embeddings)
            if self._keeps(weight, grid):
                imported += 1
                narrower += GRIDS[weight.grid or ""].width < grid.bits
            else:
                changed[name] = (
                    _on_grid(weight, grid)
                    if grid.bits < 16 and len(weight.shape) == 2 and not _is_vector(weight)
                    else _as_float(weight)
                )
        if imported:
            ctx.note(f"{imported} tensors kept the grid they came on, exactly")
        if narrower:
            ctx.note(f"{narrower} of them came on fewer bits than were asked for: more would bring nothing back")
        return dataclasses.replace(model, weights=model.weights.replace(changed))

    def plan(self, weight: Weight, embeddings: Sequence[str]) -> Grid:
        """Return the grid that the options give a tensor; `embeddings` names those that have a dial of their own.

        A table with rows shorter than half a group (T5's position biases) would grow on a grid: it stays in 16 bits.
        """
        bits = self.bits
        if weight.name in embeddings:
            bits = self.embedding_bits or (16 if self.bits == 16 else 8)
            bits = bits if 2 * weight.shape[-1] >= self.group else 16
        grid = Grid(bits=bits, group=self.group, symmetric=self.symmetric)
        for text in self.overrides:
            pattern, chosen = parse_override(text, self)
            if fnmatch.fnmatchcase(weight.name, pattern):
                grid = chosen
        return grid

    def _keeps(self, weight: Weight, grid: Grid) -> bool:
        """Say whether a tensor keeps the grid it came on."""
        known = GRIDS.get(weight.grid or "")
        return self.import_ and grid.bits < 16 and known is not None and known.width <= grid.bits


def parse_override(text: str, defaults: Quantize) -> tuple[str, Grid]:
    """Read "PATTERN=BITS" or "PATTERN=BITS/GROUP"; ConfigError when it is neither."""
    pattern, _, value = text.rpartition("=")
    bits, _, group = value.partition("/")
    try:
        grid = Grid(bits=int(bits), group=int(group) if group else defaults.group, symmetric=defaults.symmetric)
    except ValueError:
        grid = Grid(bits=0, group=0, symmetric=True)
    if not pattern or grid.bits not in BITS or grid.group not in GROUPS:
        raise ConfigError(
            f"quantize.overrides: expected PATTERN=BITS or PATTERN=BITS/GROUP with bits 2, 4, 8 or 16 and group "
            f"{', '.join(map(str, GROUPS))}, got {text!r}"
        )
    return pattern, grid


def _on_grid(weight: Weight, grid: Grid) -> Weight:
    """Return a weight whose value is rounded to nearest when it is read."""
    out, n_in = weight.shape

    def load() -> QuantizedTensor:
        try:
            return round_to_nearest(_floats(weight), bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
        except ValueError as error:
            raise StageError(f"{weight.name} cannot be quantized: {error}") from error

    nbytes = quantized_nbytes((out, n_in), bits=grid.bits, group=grid.group, offset_bytes=0 if grid.symmetric else 1)
    return dataclasses.replace(weight, dtype=f"q{grid.bits}", nbytes=nbytes, load=load, grid="rtn")


def _as_float(weight: Weight) -> Weight:
    """Return a matrix in 16 bits (bfloat16 stays so), or a vector as it is: vectors are small and delicate."""
    if weight.grid is None and (_is_vector(weight) or weight.dtype in ("float16", "bfloat16")):
        return weight

    def load() -> np.ndarray:
        value = _floats(weight)
        if max(value.max(initial=0), -value.min(initial=0)) > np.finfo(np.float16).max:
            raise StageError(
                f"{weight.name} has values beyond float16's range; a bfloat16 source would be kept as it is"
            )
        return value.astype(np.float16)

    return dataclasses.replace(weight, dtype="float16", nbytes=2 * weight.size, load=load, grid=None)


def _is_vector(weight: Weight) -> bool:
    """Say whether a weight has one axis at most that counts: a bias [1, vocab] of logits is no matrix."""
    return weight.size == max(weight.shape, default=1)


def _floats(weight: Weight) -> np.ndarray:
    """Read a weight as floats: as stored, or decoded to float32 when it lies on a grid."""
    value: Value = weight.load()
    return dequantize(value) if isinstance(value, QuantizedTensor) else value
