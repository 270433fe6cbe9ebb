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
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgepipe.artifacts import ActivationPlan, Context, Json, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError
from edgepipe.numerics.gguf_blocks import GRIDS
from edgepipe.numerics.grids import Grid, dequantize, quantized_nbytes, round_to_nearest
from edgepipe.numerics.smoothing import smoothed
from edgepipe.numerics.ternary import SOURCE_GRID, round_to_ternary
from edgepipe.quantizers import METHODS, WITHOUT_DATA
from edgepipe.quantizers.row_options import (
    TERNARY,
    TERNARY_PAIRS,
    by_token,
    check_median,
    check_tokens,
    check_training,
    token_grid,
)
from edgepipe.weights import Value, Weight, held_weight

if TYPE_CHECKING:
    from edgepipe.quantizers.texts import Batch, Calibration

BITS = (2, 4, 8, 16)
GROUPS = (16, 32, 64, 128)
ACTIVATIONS = ("none", "dynamic", "static")
RANGES = ("minmax", "percentile", "entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Options of the stage `quantize`."""

    bits: int | float = 4  # of the layers' matrices: 1.58 (ternary, trained), 2, 4, 8, or 16 (kept in 16-bit floats)
    embedding_bits: int = 0  # of embedding and output head: 2, 4, 8, 16; 0 means 8, or 16 when bits is 16
    group: int = 32  # elements of a row that share a scale: 16, 32, 64, 128
    symmetric: bool = True  # false adds integer zero points, one a group
    import_: bool = True  # keep the grid of a source that lies on one no wider than asked (bits below 16)
    method: str = "rtn"  # how the layers' codes are chosen: rtn (round to nearest), gptq, awq, hqq, autoround
    activations: str = "none"  # dynamic or static: what 8-bit layers read is rounded too; dynamic: 4-bit layers as well
    ranges: str = "minmax"  # of static activations: minmax, percentile, entropy
    smooth: float = 0.0  # SmoothQuant's α, which moves outliers from activations to weights: 0 (off) to 1
    calibration: str = ""  # texts it looks at: a set's name, a file, self (a decoder writes them); empty: everyday
    samples: int = 128  # rows of ids it looks at, at most
    tokens: int = 128  # ids of a row, at most, in training too
    agreement: float = 0.0  # least share of greedy tokens that stay the float model's, or layers get more bits; 0: off
    overrides: tuple[str, ...] = ()  # "PATTERN=BITS" or "PATTERN=BITS/GROUP", PATTERN a glob over tensor names
    # --- layers with one scale a row, whose activations are rounded token by token: 4 bits and dynamic, or ternary
    activation_bits: int = 8  # of these activations: 8, 4
    activation_symmetric: bool = False  # levels of a token lie around zero, which saves its zero point
    ternary: str = "median"  # of |w|: what a ternary matrix's scale is: median, mean
    normalize: bool = True  # a ternary layer puts what it reads through a LayerNorm without weights first, as BitLinear
    # --- training on the grid
    steps: int = 0  # optimizer steps; 0: layers are rounded as they are
    data: str = ""  # what they are trained with: .jsonl, .csv, .tsv, a text, or what `datasets` saved
    columns: str = ""  # where parts stand that the file names otherwise: first=5,second=6
    held_out: float = 0.05  # share of the data that is kept aside to judge by
    batch: int = 32  # examples of a step
    learning_rate: float = 1e-4  # highest one, after the warm-up
    warmup: int = 20  # steps until the learning rate is at its highest
    precision: str = "auto"  # auto, bf16, no; auto: bf16 where the machine gains by it
    logits: float = 1.0  # weight of the distance to the float model's logits, or embedding
    hidden: float = 1.0  # weight of the distance to its blocks' states
    attention: float = 1.0  # weight of the distance to its attention maps, where it gives them
    targets: float = 0.0  # weight of the data's own labels, targets or next tokens
    strength_steps: int = 0  # steps within which rounding grows to its whole strength (λ); 0: at once
    scratch: bool = False  # random weights at first, in place of the model's

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.bits not in (TERNARY, *BITS):
            raise ConfigError(f"quantize.bits: expected one of 1.58, 2, 4, 8, 16, got {self.bits}")
        if self.embedding_bits not in (0, *BITS):
            raise ConfigError(f"quantize.embedding_bits: expected one of 2, 4, 8, 16, got {self.embedding_bits}")
        if self.group not in GROUPS:
            raise ConfigError(f"quantize.group: expected one of {', '.join(map(str, GROUPS))}, got {self.group}")
        if self.method not in METHODS:
            raise ConfigError(f"quantize.method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name, least in (("samples", 1), ("tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"quantize.{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.agreement <= 1:
            raise ConfigError(f"quantize.agreement: expected a share from 0 (off) to 1, got {self.agreement}")
        check_tokens(self)
        self._check_activations()
        check_training(self)
        if self.calibration and not self._looks:
            raise ConfigError(f"quantize.calibration: the method {self.method} looks at no texts: leave it out")
        for text in self.overrides:
            parse_override(text, self)

    def _check_activations(self) -> None:
        """Refuse options of activations that are out of range, or say nothing."""
        if self.activations not in ACTIVATIONS:
            raise ConfigError(
                f"quantize.activations: expected one of {', '.join(ACTIVATIONS)}, got {self.activations!r}"
            )
        if self.ranges not in RANGES:
            raise ConfigError(f"quantize.ranges: expected one of {', '.join(RANGES)}, got {self.ranges!r}")
        if not 0 <= self.smooth <= 1:
            raise ConfigError(f"quantize.smooth: expected 0 (off) to 1, got {self.smooth}")
        if self.activations == "none":
            for name, value, usual in (("ranges", self.ranges, "minmax"), ("smooth", self.smooth, 0.0)):
                if value != usual:
                    raise ConfigError(
                        f"quantize.{name} is for rounded activations: set quantize.activations, or leave it out"
                    )
        elif self.bits != 8 and (self.activations == "static" or self.bits != 4):
            raise ConfigError(
                f"quantize.activations={self.activations} takes symmetric 8-bit layers that are rounded to nearest: "
                "use --bits 8, no zero points and no other method, or --bits 4 with dynamic ones"
            )
        elif not self.symmetric or self.method != "rtn" or (self.smooth and self.bits == 4):
            raise ConfigError(
                f"quantize.activations={self.activations} takes symmetric {self.bits}-bit layers that are rounded to "
                "nearest: leave zero points, other methods and, at 4 bits, quantize.smooth out"
            )
        if self.ranges != "minmax" and self.activations != "static":
            raise ConfigError("quantize.ranges is for static activations: dynamic ones take the range of every run")

    @property
    def _looks(self) -> bool:
        """Say whether texts are looked at."""
        return self.method not in WITHOUT_DATA or self.activations == "static" or self.smooth > 0 or self.agreement > 0

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        found: Json = {}
        if self.method != "rtn":
            from edgepipe.quantizers.choose import versions_of

            found["versions"] = versions_of(self.method)
        if self._looks:
            from edgepipe.quantizers.texts import fingerprint

            found |= fingerprint(self._texts())
        if self.steps:
            from edgepipe.quantizers.qat import TRAINERS, read_training
            from edgepipe.store import versions

            found |= {"data": read_training(self).sha256, "versions": versions(TRAINERS)}
        return found

    def check_exits(self, name: str) -> None:
        """Refuse what an encoder with exits can't be given, before it is trained too."""
        if self.activations == "static":
            raise ConfigError(
                f"quantize.activations=static: {name} has exits, and ranges are those of all layers: take dynamic"
            )
        if self.steps:
            raise ConfigError(
                f"quantize.steps: {name} has exits, and training on a grid judges all layers alone: leave steps out"
            )

    def check(self, model: TorchModel) -> None:
        """Refuse overrides that match no tensor, and a method that can't work here or on this model."""
        if self.method != "rtn":
            from edgepipe.quantizers.choose import check_method

            check_method(self.method, model, self._texts())
        patterns = {parse_override(text, self)[0] for text in self.overrides}
        unmatched = sorted(p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in model.weights))
        if unmatched:
            raise ConfigError(f"quantize.overrides: no tensor matches {', '.join(unmatched)}")
        if self._looks:
            from edgepipe.quantizers.texts import check_calibration

            check_calibration(model.info, self._texts())
        if self.agreement:
            from edgepipe.quantizers.guard import check_floor

            check_floor(model.info, self.method)
        from edgepipe.students.config import has_exits

        if has_exits(model.info.config):
            self.check_exits(model.info.name)
        self._rows(model)
        check_median(self, model.history)
        if self.steps:
            from edgepipe.quantizers.qat import check_data

            check_data(model, self)

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with every matrix on the grid the plan gives it; values are computed when they are read."""
        self.check(model)
        rows = self._rows(model)
        if rows:
            self._say_rows(rows, model.info.task, ctx)
        if self.steps:
            from edgepipe.quantizers.qat import train_on_grid

            model = train_on_grid(model, rows, self, ctx)
        scales, activations = self._activations(model, rows, ctx)
        changed: dict[str, Weight] = {}
        grids: dict[str, Grid] = {}
        imported = narrower = 0
        for name in model.weights:
            weight = model.weights[name]
            grid = self.plan(weight, model.info.embeddings, rows)
            if self._keeps(weight, grid):
                imported += 1
                narrower += GRIDS[weight.grid or ""].width < grid.bits
            else:
                measure = self.ternary if self.bits == TERNARY and name in rows else ""
                changed[name] = self.stored(weight, grid, scales.get(name), measure)
                if changed[name].grid is not None:
                    grids[name] = grid
        changed |= self._chosen(model, {n: g for n, g in grids.items() if n not in model.info.embeddings}, ctx)
        if self.agreement:
            from edgepipe.quantizers.guard import hold_floor

            grid = Grid(bits=int(self.bits), group=self.group, symmetric=self.symmetric)
            changed |= hold_floor(model, changed, self.agreement, self._texts(), self.stored, grid, ctx)
        if self._looks and model.info.task == "text2text-generation":
            from edgepipe.quantizers.listening import note_listening

            note_listening(model, model.weights.replace(changed), self._texts(), ctx)
        if imported:
            ctx.note(f"{imported} tensors kept the grid they came on, exactly")
        if narrower:
            ctx.note(f"{narrower} of them came on fewer bits than were asked for: more would bring nothing back")
        return dataclasses.replace(model, weights=model.weights.replace(changed), activations=activations)

    def _rows(self, model: TorchModel) -> tuple[str, ...]:
        """Return the matrices that get one scale a row and read rounded tokens: linear layers inside of blocks.

        Raises ConfigError when there should be some, and the model has none.
        """
        if not by_token(self):
            return ()
        from edgepipe.quantizers.modules import block_layers

        found = block_layers(model)
        rows = tuple(n for n in found if self.plan(model.weights[n], model.info.embeddings, found).group == 0)
        if not rows:
            raise ConfigError(
                f"{model.info.name} has no linear layer whose activations could be rounded token by token"
            )
        return rows

    def _say_rows(self, rows: Sequence[str], task: str, ctx: Context) -> None:
        """Say how many there are, and what is known of such models."""
        bits = token_grid(self).bits
        ctx.note(f"{len(rows)} matrices have one scale a row and read {bits}-bit activations, with a scale a token")
        if self.bits == TERNARY and task == "text2text-generation":
            ctx.note(TERNARY_PAIRS)

    def _activations(
        self, model: TorchModel, rows: tuple[str, ...], ctx: Context
    ) -> tuple[dict[str, np.ndarray], ActivationPlan | None]:
        """Return the column scales of matrices that are smoothed, and the plan of what they read."""
        if rows:
            normalizes = self.bits == TERNARY and self.normalize
            return {}, ActivationPlan(kind="token", tokens=token_grid(self), layers=rows, normalizes=normalizes)
        if self.activations == "none":
            return {}, None
        kind: Literal["dynamic", "static"] = "static" if self.activations == "static" else "dynamic"
        if not self._looks:
            return {}, ActivationPlan(kind=kind)
        from edgepipe.quantizers.modules import module_of
        from edgepipe.quantizers.texts import DEFAULT_SET, batches

        module = module_of(model) if self.smooth or self.calibration == "self" else None
        found = batches(model, self._texts(), seed=ctx.seed, module=module, progress=ctx.progress)
        scales: dict[str, np.ndarray] = {}
        if self.smooth:
            from edgepipe.quantizers.smoothquant import smoothing_scales

            grids = {name: self.plan(model.weights[name], model.info.embeddings) for name in model.weights}
            whole = [n for n, grid in grids.items() if grid.group == 0 and not self._keeps(model.weights[n], grid)]
            scales = smoothing_scales(module, model.weights, whole, found, self.smooth)
            ctx.note(f"{len(scales)} matrices smoothed with α = {self.smooth:g}")
        if kind == "dynamic":
            return scales, ActivationPlan(kind=kind)
        kept = tuple({key: array for key, array in _arrays(batch) if array is not None} for batch in found)
        name = self.calibration or DEFAULT_SET
        return scales, ActivationPlan(kind=kind, ranges=self.ranges, calibration=name, batches=kept)

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

    def plan(self, weight: Weight, embeddings: Sequence[str], rows: Sequence[str] = ()) -> Grid:
        """Return the grid that the options give a tensor; `embeddings` names those that have a dial of their own.

        `rows` names those with one scale a row that read rounded tokens; what isn't one of these has the embeddings'
        dial then. A table with rows shorter than half a group (T5's position biases) would grow on a grid: it stays in
        16 bits.
        """
        bits = 2 if self.bits == TERNARY else int(self.bits)
        layer = weight.name in rows if by_token(self) else weight.name not in embeddings
        if not layer:
            bits = self.embedding_bits or (16 if self.bits == 16 else 8)
            bits = bits if 2 * weight.shape[-1] >= self.group else 16
        whole = layer and (by_token(self) or (self.activations != "none" and bits == 8))
        grid = Grid(bits=bits, group=0 if whole else self.group, symmetric=self.symmetric)
        for text in self.overrides:
            pattern, chosen = parse_override(text, self)
            if fnmatch.fnmatchcase(weight.name, pattern):
                grid = chosen
        return grid

    def stored(self, weight: Weight, grid: Grid, column_scale: np.ndarray | None = None, measure: str = "") -> Weight:
        """Return a weight as a grid stores it: kept as it came, rounded to nearest, or in 16 bits.

        What is rounded is smoothed by `column_scale` [in] first, if given; with a `measure` its grid is ternary.
        """
        if self._keeps(weight, grid):
            return weight
        if grid.bits < 16 and len(weight.shape) == 2 and not _is_vector(weight):
            return _on_grid(weight, grid, column_scale, measure)
        return _as_float(weight)

    def _keeps(self, weight: Weight, grid: Grid) -> bool:
        """Say whether a tensor keeps the grid it came on."""
        known = GRIDS.get(weight.grid or "")
        if grid.group == 0 and by_token(self):
            return False  # rounded tokens meet one scale a row
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


def _on_grid(weight: Weight, grid: Grid, column_scale: np.ndarray | None = None, measure: str = "") -> Weight:
    """Return a weight whose value is rounded to nearest when it is read, smoothed by `column_scale` [in] if given.

    With a `measure` its grid is ternary.
    """
    out, n_in = weight.shape

    def load() -> QuantizedTensor:
        value = _floats(weight)
        if column_scale is not None:
            value = smoothed(value, column_scale)
        try:
            if measure:
                return round_to_ternary(value, measure)
            rounded = round_to_nearest(value, bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
            return dataclasses.replace(rounded, column_scale=column_scale)
        except ValueError as error:
            raise StageError(f"{weight.name} cannot be quantized: {error}") from error

    nbytes = quantized_nbytes((out, n_in), bits=grid.bits, group=grid.group, offset_bytes=0 if grid.symmetric else 1)
    nbytes += 0 if column_scale is None else column_scale.nbytes
    came_from = SOURCE_GRID if measure else "rtn"
    return dataclasses.replace(weight, dtype=f"q{grid.bits}", nbytes=nbytes, load=load, grid=came_from)


def _held(weight: Weight, value: QuantizedTensor) -> Weight:
    """Return a weight whose codes a method has chosen."""
    return dataclasses.replace(
        weight, dtype=f"q{value.bits}", nbytes=value.nbytes, load=lambda: value, grid=value.source_grid
    )


def _arrays(batch: Batch) -> list[tuple[str, np.ndarray | None]]:
    """Return the arrays of a batch by name."""
    return [(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)]


def _as_float(weight: Weight) -> Weight:
    """Return a matrix in 16 bits (bfloat16 stays so), or a vector as it is: vectors are small and delicate."""
    if weight.grid is None and (_is_vector(weight) or weight.dtype in ("float16", "bfloat16")):
        return weight

    def load() -> np.ndarray:
        value = _floats(weight)
        largest = max(value.max(initial=0), -value.min(initial=0))
        if np.isnan(largest):
            raise StageError(f"{weight.name} cannot be quantized: the weight has values that are not finite")
        if largest > np.finfo(np.float16).max:
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
