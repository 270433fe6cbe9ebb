"""Lowered students: the portable graphs' numbers on every grid, the operators that are to be there, each byte once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe.artifacts import OnnxModel, TorchModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.fuse_reading import fuse_reading
from edgepipe.errors import ContractError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate, logits_in_pieces
from edgepipe.graph.parts import padding
from edgepipe.runtime.onnxruntime import Decoder, open_decoder, open_graph, run_graph
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.students.config import StudentConfig, with_layers
from edgepipe.students.files import make_student, save_student
from tests.decoders import CHANGES, all_on, context, difference, mixed
from tests.reference import attention_naively
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import LLAMA, PAIR, PAIRS
from tests.students.tiny import IDS, save_tiny_student
from tests.tiny_models import save_tiny_tokenizer

TOLERANCE = 1e-4  # of the largest output, with float32 arithmetic
PARTS_TOLERANCE = 6e-4  # with 8-bit weights, whose float32 arithmetic in a decoder is two int8 parts
HALF_TOLERANCE = 2e-2  # with keys and values of 11 bits
CHUNKS = (3, 1, 1)  # of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny students of this file."""
    return tmp_path_factory.mktemp("students")


def opened(folder: Path, name: str) -> TorchModel:
    """Open a tiny student, saved on first use."""
    path = folder / name.replace(" ", "-")
    if not path.exists():
        save_tiny_student(path, {**PAIRS, **ENCODERS}[name])
    return open_model(str(path))


def exported(model: TorchModel) -> OnnxModel:
    """Write a student as portable graphs, unchecked."""
    return Export(context=64, check_tokens=0)(model, context(Path()))


def lowered(model: OnnxModel, directory: Path, **options: Any) -> None:
    """Lower a model into a directory."""
    graphs, file = engine.lower(model, **{"accuracy_level": 0, **options})
    engine.write(graphs, file, directory, lambda _done, _total: None)


def loaded(model: OnnxModel, directory: Path, cache_dtype: str = "float32") -> Decoder:
    """Lower an encoder-decoder into a directory and open it with the runtime."""
    lowered(model, directory, cache_dtype=cache_dtype)
    graphs = {name: f"{name}.onnx" for name in model.graphs}
    manifest = {"graphs": graphs, "model": model.spec, "cache": {"dtype": cache_dtype}}
    return open_decoder(directory, manifest, 1)


def sources(rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask [rows, 11] of sources whose later rows are shorter."""
    return np.random.default_rng(4).integers(0, 384, (rows, 11)), padding([rows, 11])


def logits_of_rows(decoder: Decoder, target: np.ndarray) -> np.ndarray:
    """Read each row's source without its padding and run target [rows, n] as a batch in CHUNKS. → [rows, n, vocab]"""
    rows = len(target)
    ids, mask = sources(rows)
    cache = decoder.new_cache(rows)
    for row in range(rows):
        decoder.read_source(cache, row, ids[row : row + 1, : mask[row].sum()])
    pieces, start = [], 0
    for size in CHUNKS:
        part, positions = target[:, start : start + size], np.tile(np.arange(size), (rows, 1))
        past = np.full(rows, start)
        pieces.append(decoder.run(cache, part, past, np.full(rows, size), positions).copy())
        start += size
    return np.concatenate(pieces, axis=1)


def error(model: OnnxModel, directory: Path, cache_dtype: str = "float32") -> float:
    """Return how far the logits of a ragged batch lie from the portable graphs', in largest logits."""
    ids, mask = sources()
    target = np.random.default_rng(5).integers(0, 384, (3, sum(CHUNKS)))
    expected = logits_in_pieces(model, target, [sum(CHUNKS)], {"input_ids": ids, "attention_mask": mask})
    return difference(logits_of_rows(loaded(model, directory, cache_dtype), target), expected)


@pytest.mark.parametrize("grid", ["float32", "4 bits", "8 bits"])
@pytest.mark.parametrize("kind", PAIRS)
def test_every_pair(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """Rows that are read one by one without padding answer as the portable graphs do for a padded batch."""
    allowed = PARTS_TOLERANCE if grid == "8 bits" else TOLERANCE
    assert error(exported(all_on(opened(folder, kind), grid)), tmp_path) < allowed


@pytest.mark.parametrize("grid", sorted(set(CHANGES) - {"float32", "4 bits", "8 bits"}))
def test_every_grid(folder: Path, tmp_path: Path, grid: str) -> None:
    """Rows that are no whole groups, biases, plain MLPs."""
    allowed = PARTS_TOLERANCE if grid.startswith("8") else TOLERANCE
    assert error(exported(all_on(opened(folder, "plain gelu"), grid)), tmp_path) < allowed


def test_neighbours_on_different_grids(folder: Path, tmp_path: Path) -> None:
    """What can't be joined stays apart."""
    assert error(exported(mixed(opened(folder, "plain gelu"))), tmp_path) < PARTS_TOLERANCE


def test_a_cache_in_16_bits(folder: Path, tmp_path: Path) -> None:
    """Of the answer alone: the source's keys and values stay as they come."""
    assert error(exported(opened(folder, "shared")), tmp_path, "float16") < HALF_TOLERANCE


@pytest.mark.parametrize("grid", ["float32", "4 bits", "8 bits"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """A batch with padding and one without take different branches, and give the portable graph's outputs."""
    model = exported(all_on(opened(folder, kind), grid))
    lowered(model, tmp_path)
    graph = open_graph(tmp_path / "model.onnx", 1, model.spec["ends"]["model"])
    ids, mask = sources()
    for feeds in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "attention_mask": np.ones_like(ids)}):
        ((name, expected),) = evaluate(model.graphs["model"], model.weights, feeds).items()
        assert difference(graph.run(feeds)[name], expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["shared", "untied", "causal encoder", "qwen3"])
def test_encoders_of_batches(folder: Path, tmp_path: Path, kind: str) -> None:
    """Keys and values of a padded batch, for runtimes that read several sources at once."""
    model = exported(opened(folder, kind))
    lowered(model, tmp_path)
    ids, mask = sources()
    feeds = {"input_ids": ids, "attention_mask": mask}
    got = open_graph(tmp_path / "encoder.onnx", 1).run(feeds)
    for name, expected in evaluate(model.graphs["encoder"], model.weights, feeds).items():
        assert difference(got[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("grid", ["float32", "4 bits", "8 bits"])
@pytest.mark.parametrize("kind", ["shared", "untied", "narrow decoder", "gemma"])
def test_scores_are_the_decoder_s_logits(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """One step over some rows of the head, after one token and after several."""
    model = exported(all_on(opened(folder, kind), grid))
    decoder = loaded(model, tmp_path)
    ids, tokens = sources(1)[0], np.array([3, 383, 3])
    for prefix in (np.array([[0]]), np.array([[0, 9, 4]])):
        source = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        whole = logits_in_pieces(model, prefix, [prefix.shape[1]], source)
        assert difference(decoder.score(ids, prefix, tokens), whole[0, -1, tokens]) < PARTS_TOLERANCE


def operators(graph: bytes) -> list[str]:
    """List the operators of a graph and of its branches."""
    return [node.op_type for node in _nodes(onnx.load_model_from_string(graph).graph)]


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for one in inner for node in _nodes(one))]


def test_operators(folder: Path) -> None:
    """Two encoder layers and one of the decoder: one cache, fused norms, no repeated keys, joined projections."""
    graphs, _ = engine.lower(exported(all_on(opened(folder, "shared"), "4 bits")), accuracy_level=4)
    encoder, decoder, scorer = (operators(graphs[name]) for name in ("encoder", "decoder", "scorer"))
    assert encoder.count("MatMulNBits") == 2 * 7 + 2  # q, k, v, o, gate, up, down; keys and values of a decoder layer
    assert "Split" not in encoder
    assert encoder.count("If") == 2 and encoder.count("MultiHeadAttention") == 4
    assert decoder.count("GroupQueryAttention") == 1
    # q+k+v, o, gate+up, down; q and o over the source; the head
    assert decoder.count("MatMulNBits") == 4 + 2 + 1
    assert decoder.count("FusedMatMul") == decoder.count("Softmax") == decoder.count("Where") == 1
    for found in (encoder, decoder):
        assert not {"Attention", "RMSNormalization", "Sigmoid", "Tile"} & set(found)
    assert scorer.count("MatMulNBits") == 4 + 2 and scorer.count("GatherBlockQuantized") == 2
    assert "Where" not in encoder


@pytest.mark.parametrize(("bits", "grid"), [(16, "float16"), (4, "4 bits")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_stored_once(tmp_path: Path, bits: int, grid: str, tied: bool) -> None:
    """Three graphs, one file: all of it has at most 1.05 × the bytes of the parameters."""
    stack = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 8192}
    stack |= {"head_dim": 32, "num_key_value_heads": 8}
    config = StudentConfig(kind="encoder-decoder", encoder=stack, decoder=with_layers(stack, [0]), tie_embeddings=tied)
    source = tmp_path / "student"
    source.mkdir()
    save_student(make_student(config), source, {}, IDS)
    save_tiny_tokenizer(source, 8192)
    model = all_on(open_model(str(source)), grid)
    lowered(exported(model), tmp_path, accuracy_level=4)
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file())
    assert model.weights.nbytes <= on_disk <= 1.05 * model.weights.nbytes
    assert abs(8 * model.weights.nbytes / model.weights.parameters - bits) < 0.6


def test_a_row_without_a_source_is_refused(folder: Path, tmp_path: Path) -> None:
    """So are a source that is too long, and a score without the graph for it."""
    model = exported(opened(folder, "shared"))
    decoder = loaded(model, tmp_path)
    cache = decoder.new_cache(2)
    decoder.read_source(cache, 0, np.array([[1, 2]]))
    one = np.zeros((2, 1), np.int64)
    with pytest.raises(ContractError, match="1 of 2 rows have no source: read one first"):
        decoder.run(cache, one, np.zeros(2, np.int64), np.ones(2, np.int64), one)
    with pytest.raises(ContractError, match="a source of 65 tokens does not fit the 64"):
        decoder.read_source(cache, 1, np.zeros((1, 65), np.int64))
    graphs = {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}
    bare = open_decoder(tmp_path, {"graphs": graphs, "model": model.spec, "cache": {"dtype": "float32"}}, 1)
    with pytest.raises(ContractError, match="the bundle has no graph `scorer`"):
        bare.score(np.array([[1]]), np.array([[0]]), np.array([1, 2]))


def test_another_source_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    """A cache that has decoded one source gives for the next what a new cache gives, in bound single steps too."""
    decoder = loaded(exported(opened(folder, "shared")), tmp_path)
    ids = sources(2)[0]

    def answer(cache: Any, row: int) -> np.ndarray:
        decoder.read_source(cache, 0, ids[row : row + 1, : 11 - 3 * row])
        steps = [
            decoder.run(cache, np.array([[t]]), np.array([p]), np.array([1]), np.array([[0]])).copy()
            for p, t in enumerate((0, 8, 3))
        ]
        return np.concatenate(steps, axis=1)

    used = decoder.new_cache(1)
    first = answer(used, 0)
    np.testing.assert_array_equal(answer(used, 1), answer(decoder.new_cache(1), 1))
    np.testing.assert_array_equal(answer(used, 0), first)


@pytest.mark.parametrize(("heads", "kv_heads", "new"), [(4, 4, 1), (4, 2, 1), (6, 2, 3), (3, 1, 2)])
@pytest.mark.parametrize("cross", [True, False])
def test_attention_is_the_naive_one(heads: int, kv_heads: int, new: int, cross: bool) -> None:
    """Grouped heads, padding in the second row, several queries; keys as a graph's input, or made in the graph."""
    width, tokens = 16, 7 if cross else 5
    new = new if cross else tokens
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, h, n, width)).astype(np.float32) for h, n in _sizes(heads, kv_heads, new, tokens)
    )
    mask = padding([2, tokens])
    graph = _attention(heads, kv_heads, width, cross=cross)
    flat = (lambda x: x) if cross else (lambda x: x.transpose(0, 2, 1, 3).reshape(2, x.shape[2], -1))
    for ones in (mask, np.ones_like(mask)):
        feeds = {"q": flat(q), "k": flat(k), "v": flat(v), "mask": ones}
        got = run_graph(graph, {name: np.ascontiguousarray(value) for name, value in feeds.items()}, {})["y"]
        expected = attention_naively(q, k, v, ones, 0.3)
        np.testing.assert_allclose(got, flat(expected), atol=1e-5)


def _sizes(heads: int, kv_heads: int, new: int, tokens: int) -> list[tuple[int, int]]:
    return [(heads, new), (kv_heads, tokens), (kv_heads, tokens)]


def _attention(heads: int, kv_heads: int, width: int, *, cross: bool) -> bytes:
    """Return a lowered graph of one Attention."""
    g, kind = GraphBuilder("attention"), ir.DataType.FLOAT
    if cross:
        q, k, v = (
            g.input(n, kind, ["batch", h, "n", width]) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
    else:
        q, k, v = (
            g.input(n, kind, ["batch", "n", h * width]) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k, v = (g.op("Identity", [x]) for x in (q, k, v))
    mask = g.input("mask", ir.DataType.INT64, ["batch", "tokens"])
    axes = g.constant(np.array([1, 2]))
    seen = g.op("Unsqueeze", [g.op("Cast", [mask], {"to": int(ir.DataType.BOOL)}), axes])
    sizes = {} if cross else {"q_num_heads": heads, "kv_num_heads": kv_heads}
    notes = {"heads": str(heads), "head_dim": str(width)}
    y = g.op("Attention", [q, k, v, seen], {**sizes, "scale": 0.3, "is_causal": 0}, notes=notes)
    g.output("y", y, kind, ["batch", heads, "s", width] if cross else ["batch", "s", heads * width])
    model = ir.from_proto(onnx.load_model_from_string(g.finish()))
    fuse_reading(model.graph)
    assert not any(node.op_type == "Attention" for node in model.graph)
    model.graph.opset_imports["com.microsoft"] = 1
    return bytes(ir.to_proto(model).SerializeToString())


def test_masks_of_another_kind_are_left_alone() -> None:
    """A mask that says more than which tokens are padding stays with the standard operator."""
    g, kind = GraphBuilder("attention"), ir.DataType.FLOAT
    q, k, v = (g.op("Identity", [g.input(name, kind, ["b", "n", 32])]) for name in "qkv")
    mask = g.input("mask", ir.DataType.BOOL, ["b", 1, "n", "n"])
    attributes = {"q_num_heads": 2, "kv_num_heads": 2, "scale": 1.0, "is_causal": 0}
    g.output("y", g.op("Attention", [q, k, v, mask], attributes), kind, ["b", "n", 32])
    graph = ir.from_proto(onnx.load_model_from_string(g.finish())).graph
    fuse_reading(graph)
    assert [node.op_type for node in graph].count("Attention") == 1


def test_a_stray_head_size_is_refused(folder: Path) -> None:
    """The cache's kernel takes multiples of 16, of the decoder alone."""
    from edgepipe.errors import TargetError

    odd = dataclasses.replace(PAIR, decoder={**PAIR.decoder, "head_dim": 24} if PAIR.decoder else None)
    model = exported(open_model(str(save_tiny_student(folder / "odd", odd))))
    with pytest.raises(TargetError, match="a multiple of 16, and this model's is 24"):
        engine.lower(model, accuracy_level=0)
