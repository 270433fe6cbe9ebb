"""Every noun that flows through the pipeline: frozen records, no behaviour beyond small derived facts.

    TorchModel → TorchModel → OnnxModel → CompiledModel → Measured

Weights travel as a lazy `WeightStore` (see weights.py), so an artifact is cheap to pass around however large the
model is: nothing is read until somebody asks for one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from edgepipe.target import Target
    from edgepipe.weights import WeightStore

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """Hold one weight matrix on a grid: the one currency of compression.

    A group is `group` neighbouring elements of one output row. With `code` an unsigned integer of `bits` bits:

        symmetric     value = scale · (code − 2^(bits−1))
        zero points   value = scale · (code − zero_points)
        minima        value = scale · code + minima

    Rows are padded to whole groups; padding codes decode to a value that meets only zero activations. With
    `column_scale`, the value of column j is multiplied by column_scale[j] as well: kernels multiply x by it instead.
    """

    shape: tuple[int, int]  # (out, in): elements, padding not counted
    bits: int  # 2, 4 or 8
    group: int  # elements of one row that share a scale; the width where a whole row shares one
    # [out, groups · group · bits / 8] uint8, little end first: at 4 bits element 2i is the low nibble
    codes: np.ndarray
    scale: np.ndarray  # [out, groups] float16 | float32
    zero_points: np.ndarray | None = None  # [out, groups] uint8, one per byte
    minima: np.ndarray | None = None  # [out, groups] float16 | float32
    column_scale: np.ndarray | None = None  # [in] float16: 1 / SmoothQuant's factor of each input
    source_grid: str = "rtn"  # where the codes come from: "rtn", or the name of the imported grid ("Q4_1")

    @property
    def groups(self) -> int:
        """Return the number of groups in one row."""
        return -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and offsets together."""
        parts = (self.codes, self.scale, self.zero_points, self.minima, self.column_scale)
        return sum(p.nbytes for p in parts if p is not None)

    @property
    def has_rows(self) -> bool:
        """Say whether 2- or 4-bit codes share one scale a row: what is multiplied by rounded tokens."""
        return self.bits < 8 and self.groups == 1 and self.zero_points is None and self.minima is None

    @property
    def has_integer_rows(self) -> bool:
        """Say whether code − 128 is an int8 matrix with one scale a row: what integer products take."""
        return self.bits == 8 and self.group == self.shape[1] and self.zero_points is None and self.minima is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrid:
    """Say which grid a token's activations are rounded to: 2^bits levels with a scale of each token's own."""

    bits: int  # 4 or 8
    # "signed": the value of the largest magnitude lies on the lowest level; "zero points": levels reach from the
    # smallest to the largest value; "largest": the largest magnitude is level 127 (of 8 bits), as in BitLinear
    form: Literal["signed", "zero points", "largest"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationPlan:
    """Say how the inputs of the matrices with one scale a row are rounded when the model runs.

    `quantize` decides it, the engine's lowering carries it out; static ranges are those seen over `batches`.
    """

    kind: Literal["dynamic", "static", "token"]  # a range for every run, one for all (8 bits), or one for every token
    tokens: TokenGrid | None = None  # of "token"
    layers: tuple[str, ...] = ()  # of "token": the matrices that read rounded values; of the others all 8-bit rows
    normalizes: bool = False  # of "token": what is read goes through a LayerNorm without weights first (BitLinear)
    ranges: str = ""  # of static ones: "minmax", "percentile", "entropy"
    calibration: str = ""  # the name of what was read for them
    # Of static ones: input_ids and attention_mask [rows, tokens] int64, padded on the right, and behind an encoder
    # decoder_input_ids and decoder_mask [rows, steps] int64, one mapping a batch
    batches: tuple[Mapping[str, np.ndarray], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """Say what one finished stage did; the list of these is an artifact's history."""

    stage: str
    options: Json
    key: str  # hash of the contents the result depends on
    notes: tuple[str, ...] = ()  # sentences for people: fall-backs, checks passed, choices made
    figures: Json = field(default_factory=dict)  # for the report, outside the bundle: loss curves, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """Name a model's licence and every model it was made from."""

    id: str  # SPDX id where known, else "unknown"
    source: str  # where the model came from: package, hub id, file name
    lineage: tuple[str, ...] = ()  # older ancestors, nearest first


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Carry what stays true of a model whatever is done to its weights."""

    name: str
    task: str  # one of graph/tasks.py: "text-generation", "feature-extraction" …
    config: Json  # the Hugging Face config.json
    tokenizer: Mapping[str, bytes]  # file name → content: tokenizer.json, tokenizer_config.json; empty without text
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    licence: Licence
    fingerprint: str  # sha256 over the contents of the source files
    embeddings: tuple[str, ...] = ()  # weights that are gathered from, or give logits over a vocabulary
    sentence: Json | None = None  # of a sentence encoder: "pooling", "normalize", "max_tokens"
    preprocessor: str | None = None  # preprocessor_config.json of a model of images or sound

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Return the special tokens that a chat template may name, as tokenizer_config.json has them."""
        config = json.loads(self.tokenizer.get("tokenizer_config.json", b"{}"))
        found: dict[str, str | None] = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.get(key)
            found[key] = token.get("content") if isinstance(token, dict) else token
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchModel:
    """Hold a model as its framework sees it: a config and named weights.

    The torch module is made on demand from both (graph/reference.py), one layer at a time where it must be, so that a
    model larger than memory passes through.
    """

    info: ModelInfo
    weights: WeightStore  # Hugging Face parameter names
    activations: ActivationPlan | None = None  # None: products of activations in float
    history: tuple[StageRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """Hold a model in the portable dialect (docs/dialect.md): named graphs over one weight store."""

    info: ModelInfo
    graphs: Mapping[str, bytes]  # graph name → serialized ModelProto without weights
    weights: WeightStore
    spec: Json  # the task's shape: layers, kv_heads, head_dim, vocab_size, context …
    activations: ActivationPlan | None = None
    history: tuple[StageRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModel:
    """Hold a finished bundle directory: what an app ships."""

    info: ModelInfo
    path: Path
    manifest: Json
    history: tuple[StageRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Hold a bundle and what was measured on it; seconds and machines live here, outside the bundle's hash."""

    model: CompiledModel
    figures: Json
    history: tuple[StageRecord, ...] = ()


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def _unheard(_said: object) -> None:
    """Drop a note, or figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Give a stage what it may read besides its input and its options."""

    target: Target
    work_dir: Path  # private to the stage; empty at first, removed when the stage ends, well or not
    keep_dir: Path | None = None  # for a stage to make: left when it is stopped, and found again by the next run
    seed: int = 0
    progress: Callable[[str, int, int], None] = field(default=_silent)  # (what, done, total)
    note: Callable[[str], None] = field(default=_unheard)  # a sentence for the stage's record
    figures: Callable[[Json], None] = field(default=_unheard)  # figures for the stage's record
    recipe: Json = field(default_factory=dict)  # what was asked for, resolved; goes into the bundle's manifest
    baseline: CompiledModel | None = None  # the same model down the same river without the compression stages
    no_baseline: str = ""  # why there is none
