"""Running a portable graph: cached steps equal the whole prompt, positions are picked, weights come and go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.artifacts import OnnxModel, QuantizedTensor
from edgepipe.errors import ContractError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate, prompt_logits
from edgepipe.numerics.grids import dequantize
from edgepipe.weights import WeightStore
from tests.decoders import CHANGES, difference, exported, opened, random_ids, stored, watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def in_chunks(model: OnnxModel, ids: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run ids [batch, n] in chunks, each with the keys and values of those before; return logits and the last past."""
    batch, spec = len(ids), model.spec
    empty = np.zeros((batch, spec["kv_heads"], 0, spec["head_dim"]), np.float32)
    past = {f"past_{kind}.{i}": empty for kind in ("key", "value") for i in range(spec["layers"])}
    pieces, start = [], 0
    for size in sizes:
        steps = np.tile(np.arange(size, dtype=np.int64), (batch, 1))
        feeds = {"input_ids": ids[:, start : start + size], "position_ids": steps + start, "logits_positions": steps}
        result = evaluate(model.graphs["decoder"], model.weights, {**feeds, **past})
        pieces.append(result["logits"])
        past = {name: result[name.replace("past", "present")] for name in past}
        start += size
    return np.concatenate(pieces, axis=1), past


@pytest.mark.parametrize("kind", ["llama grouped", "mistral window", "qwen3 windows", "smollm3 windows", "granite"])
def test_cached_steps_equal_the_whole_prompt(folder: Path, kind: str) -> None:
    model = exported(opened(folder, kind))
    ids = random_ids(model, batch=2, tokens=10)
    whole = prompt_logits(model, ids)
    logits, past = in_chunks(model, ids, [4, 3, 1, 1, 1])
    assert difference(logits, whole) < 1e-5
    assert {value.shape for value in past.values()} == {(2, model.spec["kv_heads"], 10, model.spec["head_dim"])}


def test_rows_do_not_see_each_other(folder: Path) -> None:
    model = exported(opened(folder, "llama"))
    ids = random_ids(model, batch=2)
    together = prompt_logits(model, ids)
    for row in range(2):
        np.testing.assert_allclose(prompt_logits(model, ids[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


def test_logits_come_for_the_positions_asked_for(folder: Path) -> None:
    model = exported(opened(folder, "llama"))
    ids = random_ids(model, batch=2, tokens=6)
    whole = prompt_logits(model, ids)
    empty = np.zeros((2, 7, 0, 16), np.float32)
    wanted = np.array([[5, 0], [2, 2]])
    feeds = {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(6), (2, 1)),
        "logits_positions": wanted,
        **{f"past_{part}.{i}": empty for part in ("key", "value") for i in range(2)},
    }
    got = evaluate(model.graphs["decoder"], model.weights, feeds)["logits"]
    assert difference(got, np.take_along_axis(whole, wanted[..., None], axis=1)) < 1e-5


@pytest.mark.parametrize("storage", CHANGES)
def test_a_weight_counts_as_what_it_decodes_to(storage: str) -> None:
    """Both views of one stored weight: gathered from, and multiplied by."""
    value = CHANGES[storage](np.random.default_rng(0).standard_normal((6, 40), np.float32))
    store = WeightStore({"w": stored("w", value)}, {"tied": "w"})
    g = GraphBuilder("both views")
    ids = g.input("ids", ir.DataType.INT64, ["n"])
    x = g.op("Gather", [g.weight("w", [6, 40]), ids])
    g.output("rows", x, ir.DataType.FLOAT, ["n", 40])
    g.output("y", g.op("MatMul", [x, g.weight("tied", [40, 6], transposed=True)]), ir.DataType.FLOAT, ["n", 6])
    got = evaluate(g.finish(), store, {"ids": np.array([4, 1])})
    decoded = dequantize(value) if isinstance(value, QuantizedTensor) else value.astype(np.float32)
    np.testing.assert_array_equal(got["rows"], decoded[[4, 1]])
    np.testing.assert_allclose(got["y"], decoded[[4, 1]] @ decoded.T, rtol=1e-5, atol=1e-5)


def test_weights_are_in_memory_one_at_a_time(folder: Path) -> None:
    """Every weight is read when its node runs, and gone before the next one is read."""
    model = exported(opened(folder, "llama"))
    store, held = watched(model.weights)
    prompt_logits(dataclasses.replace(model, weights=store), random_ids(model))
    assert held.most == 1
    assert held.now == 0


def test_a_weight_that_is_not_there_is_named() -> None:
    g = GraphBuilder("lost")
    x = g.input("x", ir.DataType.FLOAT, [4])
    g.output("y", g.op("Add", [x, g.weight("lost", [4])]), ir.DataType.FLOAT, [4])
    with pytest.raises(ContractError, match="no tensor named 'lost'"):
        evaluate(g.finish(), WeightStore({}), {"x": np.zeros(4, np.float32)})
