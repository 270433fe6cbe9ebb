"""An int8 cache: attention over codes beside a naive one, its scales, a source's codes, bytes, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe.artifacts import OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.cache_scales import CacheScales, observe_cache
from edgepipe.engines.onnxruntime.fuse_attention import fuse_attention
from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate
from edgepipe.pipeline import _uncompressed
from edgepipe.runtime.onnxruntime import open_decoder, open_graph, run_graph
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.target import load_target
from tests.decoders import context, exported, opened
from tests.reference import attention_naively, coded_naively
from tests.students.test_models import PAIR
from tests.students.tiny import save_tiny_student
from tests.tiny_models import save_tiny_model

WIDTH, ROOM = 16, 12  # head size, tokens of the cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> OnnxModel:
    return exported(opened(folder, "llama grouped"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> OnnxModel:
    model = open_model(str(save_tiny_student(folder / "pair", PAIR)))
    return Export(context=64, check_tokens=0)(model, context(Path()))


def attention(heads: int, kv_heads: int, scales: dict[str, np.ndarray]) -> bytes:
    """Return a lowered graph of one Attention over a cache of codes."""
    g, kind = GraphBuilder("attention"), ir.DataType.FLOAT
    sizes = (("q", heads), ("k", kv_heads), ("v", kv_heads))
    new = [g.input(name, kind, ["batch", "n", count * WIDTH]) for name, count in sizes]
    past = [g.input(f"past_{name}.0", kind, ["batch", kv_heads, "past", WIDTH]) for name in ("key", "value")]
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.3, "is_causal": 1}
    y, *present = g.op_multi("Attention", [*new, None, *past], attributes, 3)
    g.output("y", g.op("Identity", [y]), kind, ["batch", "n", heads * WIDTH])
    for name, value in zip(("key", "value"), present, strict=True):
        g.output(f"present_{name}.0", value, kind, ["batch", kv_heads, "total", WIDTH])
    model = ir.from_proto(onnx.load_model_from_string(g.finish()))
    spec = {"kv_heads": kv_heads, "context": ROOM, "head_dim": WIDTH}
    fuse_attention(model.graph, spec, ir.DataType.INT8, scales)
    model.graph.opset_imports["com.microsoft"] = 1
    return bytes(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_over_codes_is_the_naive_one(heads: int, kv_heads: int) -> None:
    """A prompt, then token by token; channels of other scales, and values that lie beyond theirs."""
    rng = np.random.default_rng(0)
    tokens = 9
    q, k, v = (
        rng.standard_normal((1, count, tokens, WIDTH)).astype(np.float32) for count in (heads, kv_heads, kv_heads)
    )
    scales = {
        f"{name}.0": rng.uniform(0.01, 0.03, (kv_heads, 1, WIDTH)).astype(np.float32) for name in ("key", "value")
    }
    graph = attention(heads, kv_heads, scales)
    cache = {f"past_{name}.0": np.zeros((1, kv_heads, ROOM, WIDTH), np.int8) for name in ("key", "value")}
    in_place = {f"present_{name}.0": f"past_{name}.0" for name in ("key", "value")}
    got = []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        parts = ((name, x[:, :, start:stop].transpose(0, 2, 1, 3)) for name, x in (("q", q), ("k", k), ("v", v)))
        new = {name: part.reshape(1, stop - start, -1) for name, part in parts}
        lengths = {"seqlens_k": np.array([stop - 1], np.int32), "total_sequence_length": np.array([stop], np.int32)}
        feeds = {name: np.ascontiguousarray(array) for name, array in new.items()} | cache | lengths
        got.append(run_graph(graph, feeds, in_place)["y"])
    codes = {"key.0": coded_naively(k[0], scales["key.0"]), "value.0": coded_naively(v[0], scales["value.0"])}
    for name, expected in codes.items():
        np.testing.assert_array_equal(cache[f"past_{name}"][0, :, :tokens], expected)
        assert (np.abs(expected) > 126).any()  # some lie beyond
    keys, values = (codes[name][None] * scales[name] for name in codes)
    for step in range(tokens):
        seen = (np.arange(tokens) <= step).astype(np.int64)[None]
        expected = attention_naively(q[:, :, step : step + 1], keys, values, seen, 0.3)[0, :, 0].reshape(-1)
        np.testing.assert_allclose(np.concatenate(got, 1)[0, step], expected, atol=2e-5)


def observed(model: OnnxModel, rows: list[list[int]], directory: Path) -> CacheScales:
    """Lower a model exactly and find the scales over rows of ids."""
    graphs, file = engine.lower(model, accuracy_level=0, exact=True)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    return observe_cache(model, directory, {name: f"{name}.onnx" for name in graphs}, rows, lambda _done, _total: None)


def cache_of(model: OnnxModel, ids: list[int]) -> dict[str, np.ndarray]:
    """Return the portable graph's keys and values of a text, [kv_heads, tokens, head_dim] by name."""
    spec, count = model.spec, len(ids)
    empty = np.zeros((1, spec["kv_heads"], 0, spec["head_dim"]), np.float32)
    feeds = {f"past_{kind}.{i}": empty for kind in ("key", "value") for i in range(spec["layers"])}
    feeds |= {"input_ids": np.array([ids]), "position_ids": np.arange(count)[None]}
    found = evaluate(model.graphs["decoder"], model.weights, {**feeds, "logits_positions": np.array([[count - 1]])})
    return {name.removeprefix("present_"): x[0] for name, x in found.items() if name != "logits"}


def test_scales_are_the_largest_of_every_channel(decoder: OnnxModel, tmp_path: Path) -> None:
    """Values by channel; keys by the length of the pair that a position turns."""
    rows = [[5, 9, 200, 31], [7, 7, 100], [11]]
    seen = observed(decoder, rows, tmp_path)
    assert seen.read == rows
    caches = [cache_of(decoder, ids) for ids in rows]
    assert set(seen.scales) == set(caches[0])
    half = decoder.spec["head_dim"] // 2
    for name, scale in seen.scales.items():
        whole = np.concatenate([cache[name] for cache in caches], 1).astype(np.float64)
        if name.startswith("key"):
            length = np.sqrt(whole[..., :half] ** 2 + whole[..., half:] ** 2)
            whole = np.concatenate([length, length], -1)
        np.testing.assert_allclose(scale[:, 0], np.abs(whole).max(1) / 127, rtol=1e-4)


def test_keys_stay_in_range_at_later_positions(decoder: OnnxModel, tmp_path: Path) -> None:
    """The first layer's keys are the same but for their turn: a channel's own maximum would cut them."""
    ids = [5, 9, 200, 31, 7, 77]
    scale = observed(decoder, [ids], tmp_path).scales["key.0"]
    later = np.abs(cache_of(decoder, ids * 10)["key.0"])
    assert (later <= 127 * scale * (1 + 1e-5)).all()
    own = np.abs(cache_of(decoder, ids)["key.0"]).max(1, keepdims=True)
    assert (later > 1.2 * own).any()


def test_a_sources_codes(pair: OnnxModel, tmp_path: Path) -> None:
    """The encoder's keys and values as codes are half a step from the portable ones; scorer and decoder read them."""
    compiled = Compile(cache_dtype="int8")(pair, context(tmp_path))
    (tmp_path / "float").mkdir()
    plain = Compile(cache_dtype="float32")(pair, context(tmp_path / "float"))
    source = {"input_ids": np.array([[5, 9, 200, 31]]), "attention_mask": np.ones((1, 4), np.int64)}
    expected = evaluate(pair.graphs["encoder"], pair.weights, source)
    codes = open_graph(compiled.path / "encoder.onnx", 1).run(source)
    graph = ir.from_proto(onnx.load(compiled.path / "decoder.onnx", load_external_data=False)).graph
    for name, value in expected.items():
        assert codes[name].dtype == np.int8
        held = graph.initializers[f"codes:{name}"].const_value
        assert held is not None
        scale = held.numpy()
        inside = np.abs(value) <= 127 * scale
        assert inside.mean() > 0.9
        assert (np.abs(codes[name] * scale - value) <= 0.5001 * scale)[inside].all()
    answers = []
    for one in (compiled, plain):
        opened_ = open_decoder(one.path, one.manifest, 1)
        answers.append(opened_.score(source["input_ids"], np.array([[0]]), np.arange(50)))
    assert 0 < np.abs(answers[0] - answers[1]).max() < 0.1 * np.abs(answers[1]).max()


def test_it_takes_half_the_bytes(folder: Path, tmp_path: Path) -> None:
    """Scales and all, in the manifest and in memory."""
    path = save_tiny_model(folder / "wide", "llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    model = exported(open_model(str(path)))
    assert model.spec["head_dim"] == 64
    sizes = {}
    for dtype in ("float16", "int8"):
        (tmp_path / dtype).mkdir()
        compiled = Compile(cache_dtype=dtype)(model, context(tmp_path / dtype))
        runtime = open_decoder(compiled.path, compiled.manifest, 1)
        held = runtime.new_cache(1).held(model.spec["context"])
        sizes[dtype] = sum(array.nbytes for array in held.values())
        assert sizes[dtype] == runtime.cache_bytes == compiled.manifest["cache"]["bytes"]
        assert compiled.manifest["cache"]["dtype"] == dtype
    graph = ir.from_proto(onnx.load(compiled.path / "decoder.onnx", load_external_data=False)).graph
    scales = sum(
        v.const_value.nbytes for n, v in graph.initializers.items() if n.startswith("scale:") and v.const_value
    )
    assert scales == 4 * 2 * model.spec["layers"] * 2 * 64
    assert sizes["int8"] + scales <= 0.55 * sizes["float16"]


def test_the_check_is_of_the_codes(decoder: OnnxModel, tmp_path: Path) -> None:
    """Rounding is seen, and one that is larger than allowed refused."""
    notes: list[str] = []
    Compile(cache_dtype="int8", calibration="everyday")(decoder, context(tmp_path, notes))
    assert notes[0].startswith("ranges of the int8 cache from ") and notes[0].endswith(" rows of everyday")
    (tmp_path / "tight").mkdir()
    with pytest.raises(ContractError, match=r"differs from the portable one by .* allowed 1e-03"):
        Compile(cache_dtype="int8", exact_tolerance=1e-3)(decoder, context(tmp_path / "tight"))


def test_what_is_refused(decoder: OnnxModel, folder: Path, tmp_path: Path) -> None:
    stage = Compile(cache_dtype="int8")
    torch_model = opened(folder, "llama grouped")
    stage.check(torch_model)
    encoder = dataclasses.replace(torch_model.info, task="feature-extraction")
    with pytest.raises(ConfigError, match="is for feature-extraction and keeps no cache: leave it out"):
        stage.check(dataclasses.replace(torch_model, info=encoder))
    with pytest.raises(ConfigError, match="expected a model of texts with a tokenizer"):
        stage.check(dataclasses.replace(torch_model, info=dataclasses.replace(torch_model.info, tokenizer={})))
    with pytest.raises(ConfigError, match='expected a set or a file, but "self" is neither'):
        Compile(cache_dtype="int8", calibration="self").check(torch_model)
    with pytest.raises(ConfigError, match="a float16 cache needs no texts: leave it out"):
        Compile(calibration="everyday").meets(load_target("cpu"))
    with pytest.raises(ConfigError, match="grows and stays float32: leave it out"):
        stage(dataclasses.replace(decoder, spec={**decoder.spec, "ends": {}}), context(tmp_path))
    assert stage.reads() == {"sha256": Compile(cache_dtype="int8", calibration="everyday").reads()["sha256"]}
    assert Compile().reads() == {}


def test_the_float_twin_needs_no_texts() -> None:
    """The uncompressed baseline has a float32 cache and plain weights, whatever the recipe calibrates the other on."""
    plain = _uncompressed("compile", Compile(cache_dtype="int8", calibration="everyday"))
    assert plain == Compile(cache_dtype="float32", deflate="never")
