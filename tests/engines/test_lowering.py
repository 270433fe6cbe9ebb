"""Lowering: through the runtime that ships, every member of the family on every grid computes the portable graph."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.errors import TargetError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.runtime.onnxruntime import Decoder, open_decoder
from tests.decoders import (
    CHANGES,
    CONTEXT,
    DECODERS,
    all_on,
    changed,
    difference,
    exported,
    gguf_blocks,
    mixed,
    opened,
    random_ids,
)
from tests.tiny_models import save_tiny_model

TOLERANCE = 1e-4  # of the largest logit, with float32 arithmetic
PARTS_TOLERANCE = 6e-4  # with 8-bit weights, whose float32 arithmetic is two int8 parts: 16 bits of activations
COARSE_TOLERANCE = 2e-3  # the same with 2-bit weights, which are larger beside their sums
HALF_TOLERANCE = 2e-2  # with keys and values of 11 bits
TOKENS = 12
CHUNKS = (7, 2, 1, 1, 1)  # a prompt, a second part of it, then token by token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def loaded(model: OnnxModel, directory: Path, *, level: int = 0, cache_dtype: str = "float32") -> Decoder:
    """Lower a model into a directory and open it with the runtime."""
    graphs, file = engine.lower(model, accuracy_level=level, cache_dtype=cache_dtype)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    manifest = {"graphs": {"decoder": "decoder.onnx"}, "model": model.spec, "cache": {"dtype": cache_dtype}}
    return open_decoder(directory, manifest, 1)


def logits_in_chunks(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """Run ids [1, n] in CHUNKS over one cache. → logits [1, n, vocab]"""
    cache = decoder.new_cache(1)
    pieces, start = [], 0
    for size in CHUNKS:
        part, positions = ids[:, start : start + size], np.arange(size, dtype=np.int64)[None]
        pieces.append(decoder.run(cache, part, np.array([start]), np.array([size]), positions).copy())
        start += size
    return np.concatenate(pieces, axis=1)


def error(model: OnnxModel, directory: Path, *, level: int = 0, cache_dtype: str = "float32") -> float:
    """Return how far the lowered graph's logits lie from the portable graph's, in largest logits."""
    ids = random_ids(model, tokens=TOKENS)
    decoder = loaded(model, directory, level=level, cache_dtype=cache_dtype)
    return difference(logits_in_chunks(decoder, ids), prompt_logits(model, ids))


@pytest.mark.parametrize("grid", ["float32", "4 bits"])
@pytest.mark.parametrize("kind", DECODERS)
def test_every_member(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    assert error(exported(all_on(opened(folder, kind), grid)), tmp_path) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama biases", "qwen2 tied", "gemma"])
@pytest.mark.parametrize("grid", sorted(set(CHANGES) - {"float32", "4 bits"}))
def test_every_grid(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """Rows that are no whole groups, biases, a table that is gathered from and multiplied by."""
    allowed = {"2": COARSE_TOLERANCE, "8": PARTS_TOLERANCE}.get(grid[0], TOLERANCE)
    assert error(exported(all_on(opened(folder, kind), grid)), tmp_path) < allowed


@pytest.mark.parametrize("kind", ["llama biases", "qwen3 windows", "granite biases"])
def test_neighbours_on_different_grids(folder: Path, tmp_path: Path, kind: str) -> None:
    assert error(exported(mixed(opened(folder, kind))), tmp_path) < PARTS_TOLERANCE


def blocks(folder: Path, kind: str, name: str) -> OnnxModel:
    """Export a model whose matrices the gguf package encoded."""
    path = folder / f"{kind}-blocks"
    if not path.exists():
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        save_tiny_model(path, kind, **sizes, tie_word_embeddings=True)
    model = changed(opened(folder, f"{kind} blocks"), lambda _name: partial(gguf_blocks, name=name))
    assert {weight.grid for weight in model.weights.values()} == {name, None}
    return exported(model)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_imported_blocks(folder: Path, tmp_path: Path, kind: str, name: str) -> None:
    """What gguf encoded is multiplied by as it is; Qwen2 has a bias beside the minima."""
    allowed = TOLERANCE if name.startswith("Q4") else PARTS_TOLERANCE
    assert error(blocks(folder, kind, name), tmp_path) < allowed


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_int8_activations_cost_every_imported_grid_alike(folder: Path, tmp_path: Path, name: str) -> None:
    """5-bit codes lie around the middle of their 8 bits: off it, the rounding of activations would count tenfold."""
    assert error(blocks(folder, "llama", name), tmp_path, level=4) < 0.1


@pytest.mark.parametrize("kind", ["llama grouped", "mistral window", "qwen3", "smollm3", "granite"])
def test_float16_caches(folder: Path, tmp_path: Path, kind: str) -> None:
    """Keys and values lose digits, and only those."""
    model = exported(all_on(opened(folder, kind), "4 bits"))
    found = error(model, tmp_path, cache_dtype="float16")
    assert 1e-6 < found < HALF_TOLERANCE


def test_int8_activations_differ_a_little(folder: Path, tmp_path: Path) -> None:
    """Level 4 is other arithmetic: noisier than float32, near it still."""
    found = error(exported(all_on(opened(folder, "llama"), "4 bits")), tmp_path, level=4)
    assert TOLERANCE < found < 0.1


@pytest.mark.parametrize("kind", ["llama", "mistral window"])
def test_rows_of_a_batch(folder: Path, tmp_path: Path, kind: str) -> None:
    model = exported(all_on(opened(folder, kind), "4 bits"))
    ids = random_ids(model, batch=3, tokens=8)
    decoder = loaded(model, tmp_path)
    positions = np.tile(np.arange(8), (3, 1))
    got = decoder.run(decoder.new_cache(3), ids, np.zeros(3, np.int64), np.full(3, 8), positions)
    assert difference(got, prompt_logits(model, ids)) < TOLERANCE


def test_the_whole_context_can_be_used(folder: Path, tmp_path: Path) -> None:
    """The last token that fits is right: rotary tables and caches reach that far."""
    model = exported(opened(folder, "llama rope llama3"))
    ids = random_ids(model, tokens=CONTEXT)
    decoder = loaded(model, tmp_path)
    cache = decoder.new_cache(1)
    last = CONTEXT - 1
    positions = np.arange(last)[None]
    decoder.run(cache, ids[:, :last], np.array([0]), np.array([last]), positions)
    got = decoder.run(cache, ids[:, last:], np.array([last]), np.array([1]), np.array([[0]]))
    assert difference(got[:, 0], prompt_logits(model, ids)[:, last]) < TOLERANCE


def test_the_same_model_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = exported(mixed(opened(folder, "llama biases")))
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        graphs, file = engine.lower(model, accuracy_level=4, cache_dtype="float16")
        engine.write(graphs, file, tmp_path / name, lambda _done, _total: None)
        found.append((graphs, (tmp_path / name / "weights.bin").read_bytes()))
    assert found[0] == found[1]


def test_lowering_changes_nothing_of_its_input(folder: Path) -> None:
    model = exported(all_on(opened(folder, "llama"), "4 bits"))
    before, aliases = dict(model.graphs), dict(model.weights.aliases)
    engine.lower(model, accuracy_level=0)
    assert (model.graphs, model.weights.aliases) == (before, aliases)


@pytest.mark.parametrize("head_dim", [8, 20, 24])
def test_head_sizes_the_kernel_refuses(folder: Path, head_dim: int) -> None:
    model = exported(opened(folder, "llama"))
    odd = dataclasses.replace(model, spec={**model.spec, "head_dim": head_dim})
    with pytest.raises(TargetError, match=f"a multiple of 16, and this model's is {head_dim}") as caught:
        engine.lower(odd, accuracy_level=0)
    assert "\n" not in str(caught.value)
