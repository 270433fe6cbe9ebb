"""The pass that gives attention whole rows: the same answers, nothing assumed of masks, and what it leaves alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.engines.onnxruntime.whole_heads import whole_heads

HEADS, WIDTH = 3, 8
TEXT = """
<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>
encoder (float[B, S, 24] q, float[B, S, 24] k, float[B, S, 24] v, MASK) => (float[B, S, 24] first, float[B, S, 24] last)
<int64[4] apart = {0, 0, 3, 8}, int64[3] whole = {0, 0, 24}, float zero = {0}>
{
    LAYER1
    LAYER2
}
"""
LAYER = """
    q_heads = Reshape(Q, apart)
    k_heads = Reshape(k, apart)
    v_heads = Reshape(v, apart)
    q_turned = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k_turned = Transpose<perm = [0, 2, 1, 3]>(k_heads)
    v_turned = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    y = Attention<ATTRIBUTES>(q_turned, k_turned, v_turned OPERAND)
    CLEAR
    turned = Transpose<perm = [0, 2, 1, 3]>(CLEARED)
    OUT = Reshape(turned, whole)
"""
CLEAR = "cleared = Where(blind, zero, y)"


def graph(mask: str = "", *, clear: bool = False, attributes: str = "scale = 0.25 : float") -> onnx.ModelProto:
    """Return two layers of attention, heads taken apart and put together around each."""
    inputs = ([f"{mask} mask"] if mask else []) + (["bool[B, 1, S, 1] blind"] if clear else [])
    layers = []
    for number, (query, out) in enumerate((("q", "first"), ("first", "last"))):
        text = LAYER.replace("Q,", f"{query},").replace("OUT", out).replace("ATTRIBUTES", attributes.split(" :")[0])
        text = text.replace("OPERAND", ", mask" if mask else "").replace("CLEARED", "cleared" if clear else "y")
        text = text.replace("CLEAR", CLEAR if clear else "")
        for name in ("q_heads", "k_heads", "v_heads", "q_turned", "k_turned", "v_turned", "y", "cleared", "turned"):
            text = text.replace(f"{name} ", f"{name}_{number} ").replace(f"{name},", f"{name}_{number},")
            text = text.replace(f"{name})", f"{name}_{number})")
        layers.append(text)
    whole = TEXT.replace("LAYER1", layers[0]).replace("LAYER2", layers[1])
    whole = whole.replace(", MASK", "".join(f", {one}" for one in inputs))
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(whole), strict_mode=True, data_prop=True)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what the pass makes of a graph."""
    found = ir.from_proto(model)
    whole_heads(found.graph)
    made: onnx.ModelProto = ir.to_proto(found)
    onnx.checker.check_model(made)
    return made


def kinds(model: onnx.ModelProto) -> Counter[str]:
    """Count the operators of a graph and of its branches."""
    nodes = list(model.graph.node)
    branches = [a.g for node in nodes for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return Counter(node.op_type for node in [*nodes, *(one for branch in branches for one in branch.node)])


def answers(model: onnx.ModelProto, **more: np.ndarray) -> list[np.ndarray]:
    """Run a graph on seeded rows."""
    rng = np.random.default_rng(5)
    rows = {name: rng.standard_normal((2, 7, HEADS * WIDTH)).astype(np.float32) for name in "qkv"}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(one) for one in session.run(None, {**rows, **more})]


def naively(rows: dict[str, np.ndarray], bias: np.ndarray) -> np.ndarray:
    """Attend as the formula has it: softmax(q kᵀ · scale + bias) v, head by head."""
    found = np.zeros_like(rows["q"])
    for text in range(len(found)):
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            q, k, v = (rows[name][text, :, part].astype(np.float64) for name in "qkv")
            scores = q @ k.T * 0.25 + bias[text, 0]
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            found[text, :, part] = shares / shares.sum(-1, keepdims=True) @ v
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Say whether two answers are the same, as float32 goes."""
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


FLOATS, BOOLS = "float[B, 1, S, S]", "bool[B, 1, S, S]"
OPEN, PADDED = np.zeros((2, 1, 7, 7), np.float32), np.zeros((2, 1, 7, 7), np.float32)
PADDED[1, :, :, 4:] = np.finfo(np.float32).min
CAUSAL = np.where(np.tril(np.ones((7, 7), bool)), 0, -1e9).astype(np.float32) + OPEN
RAISED = OPEN + np.linspace(0, 3, 7, dtype=np.float32)  # nothing is masked, and nothing is zero


@pytest.mark.parametrize("bias", [OPEN, PADDED, CAUSAL, RAISED], ids=["open", "padded", "causal", "raised"])
def test_a_mask_decides_by_its_values(bias: np.ndarray) -> None:
    """Float masks of any content: the answers of the graph as it was, and of the formula."""
    before = graph(FLOATS)
    after = rewritten(before)
    assert same(answers(after, mask=bias), answers(before, mask=bias))
    rng = np.random.default_rng(5)
    rows = {name: rng.standard_normal((2, 7, HEADS * WIDTH)).astype(np.float32) for name in "qkv"}
    np.testing.assert_allclose(answers(after, mask=bias)[0], naively(rows, bias), rtol=1e-4, atol=1e-5)
    found = kinds(after)
    assert found["Transpose"] == found["Reshape"] == 0
    assert (found["If"], found["MultiHeadAttention"], found["Attention"]) == (2, 2, 2)
    assert found["ReduceMin"] == found["ReduceMax"] == 1  # once for both layers


def test_which_branch_runs_is_what_the_mask_asks_for() -> None:
    """A branch that is spoilt shows that the other one ran."""
    for bias, spoilt, changes in ((OPEN, "else", False), (OPEN, "then", True), (PADDED, "else", True)):
        model = rewritten(graph(FLOATS))
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == f"{spoilt}_branch":
                    attribute.g.node[0].input[2] = "q"
        assert same(answers(model, mask=bias), answers(graph(FLOATS), mask=bias)) != changes


@pytest.mark.parametrize("blind", [False, True])
def test_rows_that_see_nothing_stay_cleared(blind: bool) -> None:
    """The Where that exporters put behind Attention holds in a batch of which some rows are blind, and only there."""
    before, rows = graph(BOOLS, clear=True), np.zeros((2, 1, 7, 1), bool)
    rows[1, 0, 3] = blind
    mask = np.ones((2, 1, 7, 7), bool)
    after = rewritten(before)
    found = answers(after, mask=mask, blind=rows)
    assert same(found, answers(before, mask=mask, blind=rows))
    assert np.all(found[1][1, 3] == 0) == blind
    assert kinds(after)["Squeeze"] == 1 and kinds(after)["Where"] == 2


def test_a_bool_mask_and_none() -> None:
    mask = np.ones((2, 1, 7, 7), bool)
    mask[0, :, :, 5:] = False
    for value in (mask, np.ones_like(mask)):
        assert same(answers(rewritten(graph(BOOLS)), mask=value), answers(graph(BOOLS), mask=value))
    bare = rewritten(graph())
    assert same(answers(bare), answers(graph()))
    assert kinds(bare) == {"MultiHeadAttention": 2}


def test_a_mask_for_each_head_asks_nothing() -> None:
    """Positions that differ by head are never all zero: one form, no question."""
    bias = np.random.default_rng(1).standard_normal((1, HEADS, 7, 7)).astype(np.float32)
    before = graph("float[1, 3, S, S]")
    after = rewritten(before)
    assert same(answers(after, mask=bias), answers(before, mask=bias))
    assert kinds(after) == {"Attention": 2}


@pytest.mark.parametrize("attributes", ["is_causal = 1", "softcap = 2.0"])
def test_other_attention_is_left_alone(attributes: str) -> None:
    before = graph(attributes=f"scale = 0.25, {attributes}")
    assert kinds(rewritten(before)) == kinds(before)


def test_heads_that_are_changed_in_between_are_left_alone() -> None:
    """Keys that something happens to after the split keep their heads; the other layer is rewritten."""
    before = graph(FLOATS)
    nodes = list(before.graph.node)
    place, turn = next((i, node) for i, node in enumerate(nodes) if node.output[0] == "k_turned_0")
    turned_round = onnx.helper.make_node("Neg", ["k_heads_0"], ["k_negative_0"])
    turn.input[0] = "k_negative_0"
    del before.graph.node[:]
    before.graph.node.extend([*nodes[:place], turned_round, *nodes[place:]])
    before = onnx.shape_inference.infer_shapes(before)
    after = rewritten(before)
    assert same(answers(after, mask=PADDED), answers(before, mask=PADDED))
    assert kinds(after)["Transpose"] == 4 and kinds(after)["If"] == 1
