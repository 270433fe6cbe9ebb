"""Quantize: put every weight matrix on an integer grid, or keep the grid it came on.

Round-to-nearest per group (numerics/grids.py), or lossless import: a tensor that already lies on a grid no wider than
asked keeps its codes, scales and minima. `bits` speaks of the layers; embedding and output head have their own dial,
because they are gathered from and multiplied once, and lose more per bit (docs/quantize.md has the figures). Another
`method` (edgepipe/quantizers/) chooses the codes of the layers; what it doesn't work on is rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepipe.artifacts import Context, Json, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError
from edgepipe.numerics.gguf_blocks import GRIDS
from edgepipe.numerics.grids import Grid, dequantize, quantized_nbytes, round_to_nearest
from edgepipe.quantizers import METHODS, WITHOUT_DATA
from edgepipe.weights import Value, Weight, held_weight

if TYPE_CHECKING:
    from edgepipe.quantizers.texts import Calibration

BITS = (2, 4, 8, 16)
GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Options of the stage `quantize`."""

    bits: int = 4  # of the layers' matrices: 2, 4, 8, or 16 (kept in 16-bit floats)
    embedding_bits: int = 0  # of embedding and output head: 2, 4, 8, 16; 0 means 8, or 16 when bits is 16
    group: int = 32  # elements of a row that share a scale: 16, 32, 64, 128
    symmetric: bool = True  # false adds integer zero points, one a group
    import_: bool = True  # keep the grid of a source that lies on one no wider than asked (bits below 16)
    method: str = "rtn"  # how the layers' codes are chosen: rtn (round to nearest), gptq, awq, hqq, autoround
    calibration: str = ""  # texts it looks at: a set's name, a file, self (a decoder writes them); empty: everyday
    samples: int = 128  # rows of ids it looks at, at most
    tokens: int = 128  # ids of a row, at most
    overrides: tuple[str, ...] = ()  # "PATTERN=BITS" or "PATTERN=BITS/GROUP", PATTERN a glob over tensor names

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.bits not in BITS:
            raise ConfigError(f"quantize.bits: expected one of 2, 4, 8, 16, got {self.bits}")
        if self.embedding_bits not in (0, *BITS):
            raise ConfigError(f"quantize.embedding_bits: expected one of 2, 4, 8, 16, got {self.embedding_bits}")
        if self.group not in GROUPS:
            raise ConfigError(f"quantize.group: expected one of {', '.join(map(str, GROUPS))}, got {self.group}")
        if self.method not in METHODS:
            raise ConfigError(f"quantize.method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name, least in (("samples", 1), ("tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"quantize.{name}: expected at least {least}, got {getattr(self, name)}")
        if self.calibration and self.method in WITHOUT_DATA:
            raise ConfigError(f"quantize.calibration: the method {self.method} looks at no texts: leave it out")
        for text in self.overrides:
            parse_override(text, self)

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        if self.method == "rtn":
            return {}
        from edgepipe.quantizers.choose import versions_of
        from edgepipe.quantizers.texts import fingerprint

        texts = {} if self.method in WITHOUT_DATA else fingerprint(self._texts())
        return {"versions": versions_of(self.method), **texts}

    def check(self, model: TorchModel) -> None:
        """Refuse overrides that match no tensor, and a method that can't work here or on this model."""
        if self.method != "rtn":
            from edgepipe.quantizers.choose import check_method

            check_method(self.method, model, self._texts())
        patterns = {parse_override(text, self)[0] for text in self.overrides}
        unmatched = sorted(p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in model.weights))
        if unmatched:
            raise ConfigError(f"quantize.overrides: no tensor matches {', '.join(unmatched)}")

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with every matrix on the grid the plan gives it; values are computed when they are read."""
        self.check(model)
        changed: dict[str, Weight] = {}
        grids: dict[str, Grid] = {}
        imported = narrower = 0
        for name in model.weights:
            weight = model.weights[name]
            grid = self.plan(weight, model.info.embeddings)
            if self._keeps(weight, grid):
                imported += 1
                narrower += GRIDS[weight.grid or ""].width < grid.bits
            elif grid.bits < 16 and len(weight.shape) == 2 and not _is_vector(weight):
                changed[name] = _on_grid(weight, grid)
                grids[name] = grid
            else:
                changed[name] = _as_float(weight)
        changed |= self._chosen(model, {n: g for n, g in grids.items() if n not in model.info.embeddings}, ctx)
        if imported:
            ctx.note(f"{imported} tensors kept the grid they came on, exactly")
        if narrower:
            ctx.note(f"{narrower} of them came on fewer bits than were asked for: more would bring nothing back")
        return dataclasses.replace(model, weights=model.weights.replace(changed))

    def _texts(self) -> Calibration:
        """Return what the method looks at."""
        from edgepipe.quantizers.texts import Calibration

        return Calibration(source=self.calibration, samples=self.samples, tokens=self.tokens)

    def _chosen(self, model: TorchModel, grids: dict[str, Grid], ctx: Context) -> dict[str, Weight]:
        """Return the weights that another method than round-to-nearest gives, of those named in `grids`."""
        if self.method == "rtn" or not grids:
            return {}
        from edgepipe.quantizers.choose import choose_codes

        if self.method == "hqq" and self.symmetric:
            grids = {name: dataclasses.replace(grid, symmetric=False) for name, grid in grids.items()}
            ctx.note("hqq chooses zero points, so its matrices have them")
        found = choose_codes(model, grids, self.method, self._texts(), seed=ctx.seed, progress=ctx.progress)
        for note in found.notes:
            ctx.note(note)
        if left := len(grids) - len(found.tensors):
            ctx.note(f"{left} matrices that {self.method} doesn't work on were rounded to nearest")
        tensors = {name: _held(model.weights[name], value) for name, value in found.tensors.items()}
        return tensors | {name: held_weight(name, value) for name, value in found.vectors.items()}

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


def _held(weight: Weight, value: QuantizedTensor) -> Weight:
    """Return a weight whose codes a method has chosen."""
    return dataclasses.replace(
        weight, dtype=f"q{value.bits}", nbytes=value.nbytes, load=lambda: value, grid=value.source_grid
    )


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
