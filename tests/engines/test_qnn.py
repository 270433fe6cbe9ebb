"""The engine qnn: an encoder's graph for an NPU in plain operators and on grids, on the CPU; then in the emulator."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgepipe.artifacts import CompiledModel, OnnxModel
from edgepipe.engines import qnn as engine
from edgepipe.engines.qnn.context import Placement, placement
from edgepipe.engines.qnn.plain_attention import HIDDEN
from edgepipe.engines.qnn.qdq import Grid, to_qdq
from edgepipe.engines.qnn.ranges import observe, padded
from edgepipe.errors import ConfigError, TargetError
from edgepipe.graph.evaluate import evaluate
from edgepipe.runtime.qnn import is_installed
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.target import load_target
from tests.decoders import context
from tests.encoders import save_encoder
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

TOKENS, LENGTHS = 16, (16, 9, 1)
AXES = 5
NPU = load_target("snapdragon-8gen3-htp")
TRACED = {"bert": {}, "mpnet": {}, "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2}}

# The fast ones differ in masks, heads, poolings and norms; the others take as long again for little that is new
_FAST = ("mean", "max", "latent", "causal", "encoder qwen3", "bert")
FORMS = [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*ENCODERS, *TRACED)]
# A gap: logits of a random head nearly cancel, and what 8 bits of embedding and matrices cost turns them (docs/npu.md)
_CANCELS = (pytest.mark.slow, pytest.mark.xfail(strict=True, reason="three random logits have a cosine of 0.97"))
ON_GRIDS = [
    pytest.param(name, marks=_CANCELS) if name == "classes" else form
    for name, form in zip((*ENCODERS, *TRACED), FORMS, strict=True)
]

needs_provider = pytest.mark.skipif(
    not is_installed(), reason="the NPU's compiler isn't here: pip install 'edgepipe[qnn]'"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxModel]:
    """Return what exports a tiny encoder by its name, once: a student of ENCODERS, or a family that is traced."""
    made: dict[str, OnnxModel] = {}
    folder = tmp_path_factory.mktemp("encoders")

    def make(name: str) -> OnnxModel:
        if name not in made:
            if name in ENCODERS:
                path = save_tiny_student(folder / name, ENCODERS[name])
            else:
                path = save_encoder(folder / name, name, **TRACED[name])
            made[name] = Export(check_tokens=0)(open_model(str(path)), context(folder))
        return made[name]

    return make


def texts(plain: onnx.ModelProto, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Return seeded texts of some lengths, as the graph takes them."""
    rng = np.random.default_rng(seed)
    inputs = [value.name for value in plain.graph.input]
    return [padded(rng.integers(2, 300, length).tolist(), TOKENS, inputs, 1) for length in LENGTHS]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph of fixed shapes as it stands."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = [end.name for end in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def counted(value: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Return a value without what stands at padding."""
    mask = feeds["attention_mask"].astype(bool)
    return value[mask] if value.shape[:2] == mask.shape else value


def most_of_last_product(plain: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    """Return |x| · |w|, w the longest row of the last matrix: no result of that product is larger."""
    last = [node for node in plain.graph.node if node.op_type == "MatMul"][-1]
    matrix = next(onnx.numpy_helper.to_array(t) for t in plain.graph.initializer if t.name == last.input[1])
    shown = onnx.ModelProto.FromString(plain.SerializeToString())
    shown.graph.output.append(onnx.ValueInfoProto(name=last.input[0]))
    return float(np.linalg.norm(run(shown, feeds)[last.input[0]]) * np.linalg.norm(matrix, axis=0).max())


@pytest.mark.parametrize("name", FORMS)
def test_plain_graphs_compute_the_portable_ones(encoder: Callable[[str], OnnxModel], name: str) -> None:
    """Whatever hides padding, windows and shared heads too: same numbers, fixed shapes, no operator an NPU hasn't."""
    model = encoder(name)
    plain = engine.lower(model, TOKENS, AXES)
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {"Attention", "RotaryEmbedding", "Shape", "Range"}
    values = [*plain.graph.input, *plain.graph.value_info, *plain.graph.output]
    assert all(dim.dim_value for value in values for dim in value.type.tensor_type.shape.dim)
    constants = [onnx.numpy_helper.to_array(t) for t in plain.graph.initializer]
    assert min(float(c.min()) for c in constants if c.dtype == np.float32) >= 2 * HIDDEN or name == "max"
    for feeds in texts(plain):
        whole = {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])}
        expected = evaluate(model.graphs["model"], model.weights, whole)
        got = run(plain, feeds)
        assert set(got) == set(expected)
        for output, value in expected.items():
            ours, theirs = counted(got[output], feeds), counted(value, feeds)
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("name", ON_GRIDS)
def test_graphs_on_grids(encoder: Callable[[str], OnnxModel], tmp_path: Path, name: str) -> None:
    """Activations, norms and softmax too, have 16 bits, matrices 8 with a scale a channel; little is lost."""
    model = encoder(name)
    plain = engine.lower(model, TOKENS, AXES)
    feeds = texts(plain)
    rounded = to_qdq(plain, observe(plain, feeds, tmp_path, lambda *_: None), model.weights)
    assert not list(tmp_path.iterdir())
    held = {t.name: onnx.numpy_helper.to_array(t) for t in rounded.graph.initializer}
    kinds = Counter(held[n.input[2]].dtype.name for n in rounded.graph.node if n.op_type == "QuantizeLinear")
    tables = sum(node.op_type == "Gather" and node.input[0].startswith("weight/") for node in plain.graph.node)
    assert set(kinds) <= {"uint16", "uint8"} and kinds["uint8"] == tables
    producers = {node.output[0]: node for node in rounded.graph.node}
    products = [node for node in rounded.graph.node if node.op_type == "Conv"]
    matrices = [n for n in plain.graph.node if n.op_type == "MatMul" and n.input[1].startswith("weight/")]
    assert len(products) == len(matrices) > 0
    for node in products:
        kernel = producers[node.input[1]]
        levels, scale = (held[one] for one in kernel.input[:2])
        assert levels.dtype == np.int8 and scale.shape == levels.shape[:1]
    for feed in feeds:
        expected, got = run(plain, feed), run(rounded, feed)
        for output, value in expected.items():
            ours, theirs = (counted(one, feed).ravel() for one in (got[output], value))
            assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.995, output


@pytest.mark.slow
def test_logits_on_grids(encoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """They are off by two hundredths of the most that the head could have made of its x."""
    model = encoder("classes")
    plain = engine.lower(model, TOKENS, AXES)
    feeds = texts(plain)
    rounded = to_qdq(plain, observe(plain, feeds, tmp_path, lambda *_: None), model.weights)
    for feed in feeds:
        error = np.abs(run(plain, feed)["logits"] - run(rounded, feed)["logits"]).max()
        assert 0 < error < 0.02 * most_of_last_product(plain, feed)


def test_codes_that_came_with_a_scale_a_row_are_kept(encoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """What `quantize` rounded to int8 by rows is what the NPU multiplies by."""
    from edgepipe.artifacts import QuantizedTensor
    from edgepipe.stages.quantize import Quantize

    path = save_encoder(tmp_path / "bert", "bert")
    source = Quantize(bits=8, activations="dynamic")(open_model(str(path)), context(tmp_path))
    model = Export(check_tokens=0)(source, context(tmp_path))
    plain = engine.lower(model, TOKENS, AXES)
    rounded = to_qdq(plain, observe(plain, texts(plain), tmp_path, lambda *_: None), model.weights)
    name = "encoder.layer.0.attention.self.query.weight"
    tensor = model.weights.load(name)
    assert isinstance(tensor, QuantizedTensor) and tensor.has_integer_rows
    held = {t.name: onnx.numpy_helper.to_array(t) for t in rounded.graph.initializer}
    levels = held[f"weight/{name}.T/int8/levels"][:, :, 0, 0]
    np.testing.assert_array_equal(levels, tensor.codes.astype(np.int16) - 128)
    np.testing.assert_array_equal(held[f"weight/{name}.T/int8/scale"], tensor.scale[:, 0].astype(np.float32))


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 0.0), (2.0, 7.0), (-4.0, -1.0), (-100.0, 1e-3)])
def test_a_grid_holds_zero_and_both_ends(low: float, high: float) -> None:
    """Zero exactly, so that padding adds nothing; the ends to half a level."""
    grid = Grid.of(low, high)
    values = np.array([low, 0.0, high], np.float32)
    decoded = (grid.round(values).astype(np.float64) - grid.zero) * grid.scale
    assert decoded[1] == 0
    assert np.abs(decoded - values).max() <= 0.5001 * grid.scale


def test_the_log_names_what_is_left(tmp_path: Path) -> None:
    """A node beside the binary is one of the float graph's, with the provider's reason; else a conversion."""
    values = {n: onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xyz"}
    made = onnx.helper.make_node
    nodes = [made("Relu", ["x"], ["y"], name="a"), made("Erf", ["y"], ["z"], name="b")]
    plain = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [values["x"]], [values["z"]]))
    left = [
        made("EPContext", ["x"], ["y"], name="npu", domain="com.microsoft"),
        made("DequantizeLinear", ["y"], ["y/rounded"], name="y/rounded"),
        made("Erf", ["y/rounded"], ["z"], name="z"),
    ]
    shipped = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(left, "g", [values["x"]], [values["z"]])), shipped)
    log = "\tOperator type: Erf Node name: z Node index: 3\n\tREASON : Operator type is not supported.\n"
    found = placement(plain, shipped, log)
    assert [(one.operator, one.node) for one in found.leftovers] == [("DequantizeLinear", "y/rounded"), ("Erf", "z")]
    assert found.leftovers[1].reason == "Operator type is not supported"
    assert (found.nodes, found.share) == (3, pytest.approx(1 / 3))
    assert Placement(nodes=4, leftovers=()).to_json() == {"nodes": 4, "on_npu": 4, "share": 1.0, "leftovers": []}


# ---------------------------------------------------------------------------------------------------------------------
# the stage, and what is refused


def compiled(model: OnnxModel, folder: Path, notes: list[str] | None = None, **options: object) -> CompiledModel:
    """Compile a model for the NPU."""
    folder.mkdir(exist_ok=True)
    stage = Compile(**{"tokens": TOKENS, **options})  # type: ignore[arg-type]
    return stage(model, dataclasses.replace(context(folder, notes), target=NPU))


@needs_provider
def test_a_bundle_for_an_npu(encoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """All nodes but the conversions at its end lie there, nothing of Qualcomm's is in it, texts of any length run."""
    from edgepipe.runtime import Encoder, load
    from edgepipe.runtime.qnn import said_of
    from edgepipe.verify import verify_bundle

    notes: list[str] = []
    model = encoder("bert")
    bundle = compiled(model, tmp_path, notes)
    names = {path.name for path in bundle.path.iterdir()}
    own = {"manifest.json", "sbom.cdx.json", "tokenizer.json", "chat_template.jinja"}
    assert names == {*own, "model.onnx", "model_qnn.bin"}
    npu = bundle.manifest["npu"]
    assert npu["share"] >= 0.95 and npu["on_npu"] + len(npu["leftovers"]) == npu["nodes"]
    assert {one["operator"] for one in npu["leftovers"]} == {"DequantizeLinear"}
    assert "Qualcomm_LICENSE.pdf" in npu["libraries"] and "onnxruntime-qnn" in bundle.manifest["versions"]
    assert re.match(rf"{npu['on_npu']} of {npu['nodes']} nodes \(9\d\.\d%\) lie on the NPU of {NPU.name}", notes[0])
    assert re.search(r"exact, \de-0\d as shipped in the emulator", notes[-1])
    checks = {check["name"]: check.get("problem") for check in verify_bundle(bundle.path)["checks"]}
    assert {name for name, problem in checks.items() if problem} <= {"origin"}, checks  # the stage alone has no recipe
    loaded = load(bundle.path)
    assert isinstance(loaded, Encoder) and loaded.context == TOKENS
    assert said_of(loaded.manifest).startswith("This machine has no Hexagon NPU")
    found = loaded.embed(["a river", "the mill turns, and much more than sixteen tokens can hold of it, said the man"])
    expected = []
    for row in (loaded.feeds([text]) for text in ("a river", "the mill turns, and much more than sixteen tokens can")):
        expected.append(evaluate(model.graphs["model"], model.weights, row)["embedding"][0])
    assert found.shape == (2, 64)
    assert found[0] @ expected[0] / np.linalg.norm(found[0]) / np.linalg.norm(expected[0]) > 0.99
    with pytest.raises(ConfigError, match=r"should be int64 \[1, 16\], but is int64 \[2, 16\]"):
        loaded.run({name: np.ones((2, TOKENS), np.int64) for name in loaded.inputs})


@needs_provider
def test_too_little_on_the_npu_is_refused(encoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """The sentence names the first node that is left, and why."""
    with pytest.raises(
        TargetError, match=r"takes 9\d% of the nodes .* asks for 100%.*first DequantizeLinear embedding"
    ):
        compiled(encoder("bert"), tmp_path, npu_share=1.0)


@needs_provider
@pytest.mark.parametrize("target", ["snapdragon-8gen3-htp", "snapdragon-x-elite-htp"])
def test_the_key_knows_the_chip_and_the_texts(target: str) -> None:
    """Another chip, or other texts, are another bundle."""
    key = Compile().meets(load_target(target))
    assert key["chip"]["htp_arch"] == {"snapdragon-8gen3-htp": 75, "snapdragon-x-elite-htp": 73}[target]
    assert len(key["sha256"]) == 64


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, before any work, with the extra to install."""
    monkeypatch.setattr("edgepipe.runtime.qnn.PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(
        TargetError, match=r"compiler for snapdragon-8gen3-htp isn't here: pip install 'edgepipe\[qnn\]'"
    ):
        Compile().meets(NPU)


@needs_provider
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1024}, r"compile\.tokens: expected at most the model's context of \d+, got 1024"),
        ({"cache_dtype": "int8"}, r"no int8 cache"),
        ({"deflate": "always"}, r"not deflated"),
    ],
)
def test_options_that_do_not_fit(
    encoder: Callable[[str], OnnxModel], tmp_path: Path, options: dict, message: str
) -> None:
    """Each gets its sentence."""
    with pytest.raises(ConfigError, match=message):
        _ = Compile(**options).meets(NPU), compiled(encoder("bert"), tmp_path, **options)


@needs_provider
def test_shapes_beyond_the_target(encoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """Texts that are too long for it, tensors of too many axes."""
    assert NPU.qnn is not None
    for facts, message in (
        ({"most_tokens": 8}, r"takes texts of 8 tokens at most, got 16"),
        ({"most_axes": 3}, r"takes tensors of 3 axes at most, and \S+ has 4"),
    ):
        small = dataclasses.replace(NPU, qnn=dataclasses.replace(NPU.qnn, **facts))
        folder = tmp_path / next(iter(facts))
        folder.mkdir()
        with pytest.raises(TargetError, match=message):
            Compile(tokens=TOKENS)(encoder("bert"), dataclasses.replace(context(folder), target=small))


@needs_provider
def test_models_that_no_npu_here_runs(tmp_path: Path) -> None:
    """A decoder behind an encoder is refused with the way out."""
    path = save_tiny_student(tmp_path / "pair", next(iter(PAIRS.values())))
    pair = Export(check_tokens=0)(open_model(str(path)), context(tmp_path))
    with pytest.raises(
        TargetError,
        match=r"encoders of texts and decoders of the Llama .* is for text2text-generation: take --target cpu",
    ):
        compiled(pair, tmp_path / "work")


@pytest.mark.parametrize("option", [{"calibration": "everyday"}, {"tokens": 64}])
def test_options_of_an_npu_are_for_nothing_else(option: dict) -> None:
    """On another engine they are refused before any work."""
    with pytest.raises(ConfigError, match=r"compile\.(calibration|tokens): .*leave it out"):
        Compile(**option).meets(load_target("cpu"))
