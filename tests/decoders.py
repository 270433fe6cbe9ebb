"""The family in tiny: a table of configs that differ in every way the graph builder knows, and how to run them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from edgepipe.artifacts import Context, OnnxModel, QuantizedTensor, TorchModel
from edgepipe.numerics.gguf_blocks import GRIDS, import_blocks
from edgepipe.numerics.grids import round_to_nearest
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.target import Target
from edgepipe.weights import Value, Weight, WeightStore
from tests.tiny_models import save_tiny_model

TARGET = Target(name="test", description="a machine for tests", engines=("onnxruntime",), measurable="no")
CONTEXT = 64

GROUPED = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MIXED_WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}

# What is tested → (model_type, changes to tiny_models.BASE: 2 layers of 7 heads of 16, FFN 100).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama grouped": ("llama", GROUPED),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama wide heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 48},
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    "llama rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama rope llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}),
    "llama rope yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, **MIXED_WINDOWS}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 32}),
    "qwen3 windows": ("qwen3", {"head_dim": 16, "use_sliding_window": True, **MIXED_WINDOWS}),
    "qwen3 biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3 windows": ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, **MIXED_WINDOWS}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.05,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite biases": ("granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 1}),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
}


def context(work_dir: Path, notes: list[str] | None = None) -> Context:
    """Return what a stage reads besides its input; sentences for its record go to `notes`."""
    return Context(target=TARGET, work_dir=work_dir, note=([] if notes is None else notes).append)


def saved(directory: Path, kind: str) -> Path:
    """Write one of DECODERS as a Hugging Face directory, unless it is there, and return it."""
    path = directory / kind.replace(" ", "-")
    if not path.exists():
        model_type, changes = DECODERS[kind]
        save_tiny_model(path, model_type, **changes)
    return path


def opened(directory: Path, kind: str) -> TorchModel:
    """Open one of DECODERS."""
    return open_model(str(saved(directory, kind)))


def exported(model: TorchModel, *, tokens: int = CONTEXT) -> OnnxModel:
    """Write a model as a portable graph, unchecked."""
    return Export(context=tokens, check_tokens=0)(model, context(Path()))


def random_ids(model: TorchModel | OnnxModel, batch: int = 1, tokens: int = 12) -> np.ndarray:
    """Return seeded token ids [batch, tokens]."""
    ids = np.random.default_rng(5).integers(0, model.info.config["vocab_size"], (batch, tokens), dtype=np.int64)
    return ids


def stored(name: str, value: Value) -> Weight:
    """Return the record of a weight that is in memory."""
    dtype, grid = value.dtype.name if isinstance(value, np.ndarray) else f"q{value.bits}", None
    if isinstance(value, QuantizedTensor):
        grid = value.source_grid
    return Weight(name=name, shape=value.shape, dtype=dtype, nbytes=value.nbytes, grid=grid, load=lambda: value)


def rounded(value: np.ndarray, *, bits: int, group: int = 32, symmetric: bool = True) -> QuantizedTensor:
    """Round a matrix to nearest."""
    return round_to_nearest(value, bits=bits, group=group, symmetric=symmetric)


def with_minima(value: np.ndarray, *, bits: int, scale_dtype: type = np.float16) -> QuantizedTensor:
    """Put a matrix on a grid with float minima as Q4_1 has them, rows that are no whole blocks padded."""
    plain = round_to_nearest(value, bits=bits, group=32, symmetric=False)
    assert plain.zero_points is not None
    minima = -plain.scale.astype(np.float32) * plain.zero_points
    return dataclasses.replace(
        plain,
        scale=plain.scale.astype(scale_dtype),
        zero_points=None,
        minima=minima.astype(scale_dtype),
        source_grid="test",
    )


def gguf_blocks(value: np.ndarray, name: str) -> QuantizedTensor:
    """Encode a matrix of whole blocks with the gguf package and import it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    raw = quantize(np.ascontiguousarray(value, np.float32), GGMLQuantizationType[name]).reshape(-1)
    return import_blocks(raw, (value.shape[0], value.shape[1]), GRIDS[name])


Change = Callable[[np.ndarray], Value]
CHANGES: dict[str, Change] = {
    "float32": lambda value: value,
    "float16": lambda value: value.astype(np.float16),
    "bfloat16": lambda value: value.astype(ml_dtypes.bfloat16),
    "4 bits": partial(rounded, bits=4),
    "4 bits zero points": partial(rounded, bits=4, symmetric=False),
    "4 bits groups of 16": partial(rounded, bits=4, group=16),
    "4 bits minima": partial(with_minima, bits=4),
    "2 bits": partial(rounded, bits=2),
    "2 bits zero points": partial(rounded, bits=2, symmetric=False),
    "8 bits": partial(rounded, bits=8),
    "8 bits zero points": partial(rounded, bits=8, symmetric=False),
    "8 bits minima": partial(with_minima, bits=8, scale_dtype=np.float32),
}


def changed(model: TorchModel, change: Callable[[str], Change]) -> TorchModel:
    """Return a model in which the matrix called `name` is `change(name)` of what it was."""
    weights = {
        name: stored(name, change(name)(np.asarray(weight.load())))
        for name, weight in model.weights.items()
        if len(weight.shape) == 2
    }
    return dataclasses.replace(model, weights=model.weights.replace(weights))


def all_on(model: TorchModel, grid: str) -> TorchModel:
    """Return a model whose matrices are all stored as one of CHANGES says."""
    return changed(model, lambda _name: CHANGES[grid])


def mixed(model: TorchModel) -> TorchModel:
    """Return a model in which neighbours lie on different grids."""
    grids = list(CHANGES.values())
    numbers = {name: i for i, name in enumerate(model.weights)}
    return changed(model, lambda name: grids[numbers[name] % len(grids)])


def module_logits(directory: Path, weights: WeightStore, ids: np.ndarray) -> np.ndarray:
    """Return the logits of transformers' model loaded in its usual way, its parameters then set to `weights`."""
    import torch
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(weights.float32(name)))
        logits: np.ndarray = module.eval()(torch.from_numpy(ids)).logits.numpy()
    return logits


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference in largest expected values; NaN where anything isn't finite."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


class Held:
    """Count the arrays that a store gave out and somebody still holds."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self.in_all = 0

    def count(self, value: np.ndarray) -> None:
        """Count an array until it is freed."""
        self.now += 1
        self.in_all += 1
        self.most = max(self.most, self.now)
        weakref.finalize(value, self._forget)

    def _forget(self) -> None:
        self.now -= 1


def watched(weights: WeightStore) -> tuple[WeightStore, Held]:
    """Return a store of float weights that gives out a fresh copy each time, and the count of those alive."""
    held = Held()

    def load(name: str) -> np.ndarray:
        value = np.array(weights.load(name))
        held.count(value)
        return value

    copies = {name: dataclasses.replace(weight, load=partial(load, name)) for name, weight in weights.items()}
    return WeightStore(copies, weights.aliases), held
