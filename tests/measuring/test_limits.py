"""Limits: bytes and multiply-adds counted one matrix at a time, and what they say of a figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepipe.measuring import peaks, products
from edgepipe.measuring.limits import (
    Limit,
    answer_limit,
    bytes_per_run,
    decoder_work,
    precision,
    prefill_limit,
    source_limit,
    source_work,
    token_limit,
)
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from tests.decoders import context
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student
from tests.tiny_models import save_tiny_model

PEAKS = {"read_bytes_per_second": 1e9, "multiply_adds_per_second": {"float32": 2e9, "int8": 8e9}}
SHAPE = {"hidden": 112, "inner": 100, "layers": 2, "heads": 7, "head_dim": 16, "vocab": 384}  # of the tiny model


def naive_multiply_adds(positions: list[int], heads_scored: int) -> int:
    """Count those of tokens that look at so many positions each, matrix by matrix."""
    s, total = SHAPE, 0
    width = s["heads"] * s["head_dim"]
    for seen in positions:
        for _ in range(s["layers"]):
            total += 4 * s["hidden"] * width  # q, k, v, o: as many key heads as query heads
            total += 3 * s["hidden"] * s["inner"]  # gate, up, down
            for _ in range(s["heads"]):
                total += 2 * seen * s["head_dim"]  # scores, and the weighted sum of the values
    return total + heads_scored * s["hidden"] * s["vocab"]


def test_multiply_adds_are_those_of_every_matrix(
    tiny_bundle: Path, manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    work = decoder_work(manifest_of(tiny_bundle))
    token = token_limit(work, 40, PEAKS, "float32", 1.0)
    assert token.multiply_adds == naive_multiply_adds([40], 1)
    assert token.compute_ms == pytest.approx(1e3 * token.multiply_adds / 2e9)
    prompt = prefill_limit(work, 30, 128, PEAKS, "int8", 1.0)
    assert prompt.multiply_adds == naive_multiply_adds(list(range(1, 31)), 1)
    assert prompt.compute_ms == pytest.approx(1e3 * prompt.multiply_adds / 8e9)
    chunked = prefill_limit(work, 30, 8, PEAKS, "int8", 1.0)  # every chunk reads the weights and scores one position
    assert chunked.multiply_adds == naive_multiply_adds(list(range(1, 31)), 4)
    assert chunked.bytes - prompt.bytes == 3 * work.weight_bytes


def test_an_untied_embedding_is_not_read_whole(
    tiny_bundle: Path, manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    """The tiny model has a head of its own: one of the two matrices is looked up, a row a token."""
    manifest = manifest_of(tiny_bundle)
    parts = {part["part"]: part["bytes"] for part in manifest["weights"]["parts"]}
    work = decoder_work(manifest)
    assert work.weight_bytes == sum(parts.values()) - parts["embedding and head"] // 2
    token = token_limit(work, 40, PEAKS, "float32", 1.0)
    assert token.bytes == work.weight_bytes + 40 * 2 * 2 * 7 * 16 * 2  # keys and values, layers, heads, size, float16


def test_a_tied_head_is_read_whole(
    tmp_path: Path, build_tiny: Callable[..., Path], manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    model = save_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    manifest = manifest_of(build_tiny(model))
    assert decoder_work(manifest).weight_bytes == sum(part["bytes"] for part in manifest["weights"]["parts"])


def test_of_two_storages_the_larger_counts_as_looked_up() -> None:
    part = {"part": "embedding and head", "parameters": 64 * 8}
    manifest = {
        "model": {"vocab_size": 64, "hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8},
        "cache": {"dtype": "float32"},
        "weights": {"parts": [part | {"bytes": 300}, part | {"bytes": 500}]},
    }
    assert decoder_work(manifest).weight_bytes == 300


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Path]) -> Path:
    """Make a 16-bit bundle of a tiny encoder-decoder: two layers of width 48 before one of width 32."""
    path = tmp_path_factory.mktemp("student") / "student"
    return build_tiny(save_tiny_student(path, PAIRS["narrow decoder"]), ("quantize", "bits", 16))


def test_a_source_is_read_once(student: Path, manifest_of: Callable[[Path], dict[str, Any]]) -> None:
    """Every matrix of the encoder for every token of the source; of the decoder only its own for a token."""
    manifest = manifest_of(student)
    work, source = decoder_work(manifest), source_work(manifest)
    # encoder: width 48, 4 heads of 16 over 2, FFN 80. Decoder: width 32, 2 heads of 16 over 1, FFN 80.
    encoder_layer = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80
    crossed = 2 * 48 * 16
    decoder_layer = (32 * 32 + 2 * 32 * 16 + 32 * 32) + 2 * 32 * 32 + 3 * 32 * 80
    token = answer_limit(work, source, 5, 20, PEAKS, "float32", 1.0)
    assert token.multiply_adds == decoder_layer + 32 * 384 + 2 * (5 + 20) * 32
    norms = 4 * 4 * 32  # three of a block and the last, float32
    assert token.bytes == 2 * (decoder_layer + 32 * 384) + norms + 2 * 16 * (5 * 2 + 20 * 4)
    first = source_limit(work, source, 20, PEAKS, "float32", 1.0)
    attention = 2 * 2 * 64 * 20 * 20
    read = 20 * (2 * encoder_layer + crossed) + attention
    assert first.multiply_adds == read + decoder_layer + 32 * 384 + 2 * (1 + 20) * 32
    assert first.bytes > 2 * (2 * encoder_layer + crossed) + 2 * (decoder_layer + 32 * 384)
    assert bytes_per_run(manifest) == work.weight_bytes
    assert first.tokens == 20


def test_the_parts_of_an_encoder_are_named(student: Path, manifest_of: Callable[[Path], dict[str, Any]]) -> None:
    parts = {part["part"]: part["parameters"] for part in manifest_of(student)["weights"]["parts"]}
    assert parts["mlp"] == 3 * 32 * 80 and parts["encoder: mlp"] == 2 * 3 * 48 * 80
    assert parts["embedding and head"] == 384 * (48 + 32)
    assert parts["norms and rest"] == 4 * 32 and parts["encoder: norms and rest"] == 5 * 48


def graph_multiply_adds(graph: bytes, keys: dict[str, int], tokens: int, wanted: int = 1) -> dict[str, int]:
    """Count those of an exported graph's products for `tokens` tokens: "products", and of each attention "keys" kind.

    An attention's heads are as wide together as the input of the product behind it. `keys` says how many positions an
    attention looks at, by a part of the name of its keys or, for the encoder's own, "".
    """
    nodes = list(onnx.load_model_from_string(graph).graph.node)
    dims = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load_model_from_string(graph).graph.input
    }
    counts = {"products": 0, "attention": 0}
    for at, node in enumerate(nodes):
        if node.op_type == "MatMul":
            n_in, n_out = dims[node.input[1]]
            counts["products"] += (wanted if "lm_head" in node.input[1] else tokens) * n_in * n_out
        elif node.op_type == "Attention":
            after = next(other for other in nodes[at:] if other.op_type == "MatMul")
            seen = next(count for name, count in keys.items() if any(name in value for value in node.input))
            counts["attention"] += 2 * tokens * seen * dims[after.input[1]][0]  # scores, and the sum of the values
    return counts


@pytest.mark.parametrize("kind", ["shared", "untied", "narrow decoder", "narrow untied", "qwen3"])
def test_counts_are_those_of_the_graphs(
    kind: str, tmp_path: Path, build_tiny: Callable[..., Path], manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    """What the manifest says of a source and of a token is what the exported graphs multiply."""
    model = save_tiny_student(tmp_path / "student", PAIRS[kind])
    manifest = manifest_of(build_tiny(model, ("quantize", "bits", 16)))
    work, source = decoder_work(manifest), source_work(manifest)
    graphs = Export(check_tokens=0)(open_model(str(model)), context(tmp_path)).graphs
    tokens, answered = 20, 5
    step = graph_multiply_adds(graphs["decoder"], {"cross_key": tokens, "past_key": answered}, 1)
    token = answer_limit(work, source, answered, tokens, PEAKS, "float32", 1.0)
    assert token.multiply_adds == step["products"] + step["attention"]
    read = graph_multiply_adds(graphs["encoder"], {"": tokens}, tokens)
    first = source_limit(work, source, tokens, PEAKS, "float32", 1.0)
    alone = graph_multiply_adds(graphs["decoder"], {"cross_key": tokens, "past_key": 1}, 1)
    assert first.multiply_adds == sum(read.values()) + sum(alone.values())


def test_bytes_are_those_of_the_graphs(student: Path, manifest_of: Callable[[Path], dict[str, Any]]) -> None:
    """Encoder and decoder read disjoint weights; of the embeddings only the head counts."""
    manifest = manifest_of(student)
    work, source = decoder_work(manifest), source_work(manifest)
    assert source.weight_bytes + work.weight_bytes == manifest["weights"]["bytes"] - 2 * 384 * 48


@pytest.mark.parametrize(
    ("read_ms", "compute_ms", "measured_ms", "by"),
    [
        (6.0, 2.0, 10.0, "reading"),
        (2.0, 6.0, 10.0, "arithmetic"),
        (2.0, 4.9, 10.0, "overhead"),
        (5.0, 2.0, 10.0, "reading"),
    ],
)
def test_what_limits(read_ms: float, compute_ms: float, measured_ms: float, by: str) -> None:
    """The larger of both limits, unless the figure is more than twice as long: then it is something else."""
    limit = Limit(
        tokens=1, bytes=1, multiply_adds=1, read_ms=read_ms, compute_ms=compute_ms, measured_ms=measured_ms
    ).to_json()
    assert limit["limited_by"] == by
    assert limit["limit_ms"] == max(read_ms, compute_ms)
    assert limit["share"] == pytest.approx(max(read_ms, compute_ms) / measured_ms)


def test_the_arithmetic_is_read_from_the_graph_that_ships(
    tiny_bundle: Path, exact_bundle: Path, build_tiny: Callable[..., Path], tiny_model_dir: Path
) -> None:
    """What the recipe asked for can be the target's choice; the graph says what runs."""
    assert precision((exact_bundle / "decoder.onnx").read_bytes()) == "float32"
    rounded = build_tiny(tiny_model_dir, ("compile", "accuracy_level", 4))
    assert precision((rounded / "decoder.onnx").read_bytes()) == "int8"
    assert precision(b"no product over packed weights") == "float32"


@pytest.mark.parametrize(
    ("operators", "expected"),
    [(["MatMulIntegerToFloat", "MatMulInteger", "MatMul"], "int8"), (["MatMul", "Softmax"], "float32")],
)
def test_products_of_integers_are_seen(operators: list[str], expected: str) -> None:
    nodes = [onnx.helper.make_node(operator, ["a", "b"], ["c"], name="MatMulInteger 1") for operator in operators]
    assert precision(onnx.helper.make_graph(nodes, "products", [], []).SerializeToString()) == expected


def test_peaks_are_measured(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SECONDS", 0.02)
    found = peaks.measure_peaks(tiny_bundle, 1)
    assert found["threads"] == 1
    assert 1e8 < found["read_bytes_per_second"] < 1e13
    assert all(1e8 < peak < 1e14 for peak in found["multiply_adds_per_second"].values())


def test_the_fastest_repetition_counts() -> None:
    waits = iter([0.03, 0.01, 0.02, 0.03, 0.03, *[0.03] * 100])
    found = peaks.fastest(lambda: peaks.time.sleep(next(waits)))
    assert 0.009 < found < 0.025


@pytest.mark.parametrize(
    ("graph", "op", "types"), [(products.FLOAT32, "MatMul", (1, 1, 1)), (products.INT8, "MatMulInteger", (2, 3, 6))]
)
def test_the_graphs_are_what_onnx_builds(graph: bytes, op: str, types: tuple[int, int, int]) -> None:
    from onnx import helper

    a, b, y = types
    ends = [helper.make_tensor_value_info("a", a, ["m", "k"]), helper.make_tensor_value_info("b", b, ["k", "n"])]
    outputs = [helper.make_tensor_value_info("y", y, ["m", "n"])]
    built = helper.make_graph([helper.make_node(op, ["a", "b"], ["y"])], "g", ends, outputs)
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert graph == model.SerializeToString(deterministic=True)


def test_a_bound_product_multiplies() -> None:
    """What is timed is the product itself."""
    from edgepipe.runtime.onnxruntime import bind_products

    a, b = products.int8_operands(3, 5, 4)
    results = np.zeros(0)
    compute = bind_products(products.INT8, [(a, b)], "int32", 1)[0]
    compute()
    _, arrays = compute.__defaults__[0]  # type: ignore[attr-defined]
    results = arrays["y"]
    assert (results == a.astype(np.int32) @ b.astype(np.int32)).all()
