"""A decoder's step for an NPU: the float graph beside the portable one, on grids on the CPU, then in the emulator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepipe.artifacts import CompiledModel, OnnxModel
from edgepipe.compiling.npu_step import cache_zeros
from edgepipe.engines import qnn as engine
from edgepipe.engines.qnn.plain_attention import plain_attention
from edgepipe.engines.qnn.qdq import to_qdq
from edgepipe.engines.qnn.ranges import observe_steps, stepped
from edgepipe.engines.qnn.rotate import orthogonal, rotate
from edgepipe.errors import ConfigError, TargetError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.runtime import Model, load
from edgepipe.runtime.npu_step import Decoder, ends_of_step
from edgepipe.runtime.onnxruntime import Graph, check_graph_ends, open_graph, open_session
from edgepipe.runtime.qnn import is_installed
from edgepipe.stages.compile import Compile
from edgepipe.talk import talk
from edgepipe.target import load_target
from tests.decoders import DECODERS, context, exported, opened

PLACES, AXES = 16, 5
NPU = load_target("snapdragon-8gen3-htp")
_FAST = ("llama grouped", "qwen3", "gemma")  # heads that share keys, norms of heads, norms of 1 + weight
FORMS = [
    name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS if "window" not in name
]

needs_provider = pytest.mark.skipif(
    not is_installed(), reason="the NPU's compiler isn't here: pip install 'edgepipe[qnn]'"
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxModel]:
    """Return what exports one of DECODERS, once."""
    made: dict[str, OnnxModel] = {}
    folder = tmp_path_factory.mktemp("decoders")

    def make(name: str) -> OnnxModel:
        if name not in made:
            made[name] = exported(opened(folder, name))
        return made[name]

    return make


def rows(count: int, tokens: int = 12) -> list[list[int]]:
    """Return seeded rows of ids."""
    return np.random.default_rng(3).integers(2, 300, (count, tokens)).tolist()


def logits_of(plain: onnx.ModelProto, ids: list[int], folder: Path) -> np.ndarray:
    """Return the logits [n, vocab] of a float step, token by token."""
    onnx.save(plain, folder / "step.onnx")
    graph = open_graph(folder / "step.onnx", None)
    return np.stack([values["logits"][0, 0] for _, values in stepped(graph, plain, ids)])


@pytest.mark.parametrize("name", FORMS)
def test_a_float_step_computes_the_portable_graph(
    decoder: Callable[[str], OnnxModel], tmp_path: Path, name: str
) -> None:
    """Token by token behind its own cache, for every member of the family; no operator that an NPU hasn't."""
    model, (ids,) = decoder(name), rows(1)
    plain = engine.lower(model, PLACES, AXES)
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {"Attention", "RotaryEmbedding", "Shape", "Range", "GatherND"}
    assert any(t.name.startswith("turned/") for t in plain.graph.initializer)
    values = [*plain.graph.input, *plain.graph.value_info, *plain.graph.output]
    assert all(dim.dim_value for value in values for dim in value.type.tensor_type.shape.dim)
    expected = prompt_logits(model, np.array([ids]))[0]
    found = logits_of(plain, ids, tmp_path)
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


def test_a_turned_stream_has_no_channel_that_stands_out(decoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """The same logits, and a range that is a fraction of what it was; a graph of another kind stays as it is."""
    from edgepipe.engines.qnn.fix_sizes import fix_sizes

    model, (ids,) = decoder("llama"), rows(1)
    sizes = {"batch": 1, "sequence": 1, "past": PLACES, "wanted": 1}
    only = {"logits_positions": np.zeros((1, 1), np.int64)}
    plain = plain_attention(fix_sizes(model.graphs["decoder"], model.weights, sizes, only))
    table = next(t for t in plain.graph.initializer if t.name == "weight/model.embed_tokens.weight")
    loud = onnx.numpy_helper.to_array(table).copy()
    loud[:, 5] = 1000
    table.CopyFrom(onnx.numpy_helper.from_array(loud, table.name))
    turned = rotate(plain)
    assert len(turned.graph.node) == len(plain.graph.node)
    expected, found = logits_of(plain, ids, tmp_path), logits_of(turned, ids, tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)
    stream = next(node.output[0] for node in plain.graph.node if node.op_type == "Gather" and table.name in node.input)
    before, after = (observe_steps(one, [ids], tmp_path, lambda *_: None)[stream] for one in (plain, turned))
    assert before[1] == 1000 and max(map(abs, after)) < 250
    del turned.graph.node[:]
    assert rotate(turned) is turned


@pytest.mark.parametrize("width", [64, 112, 96, 7])
def test_what_turns_is_orthogonal_and_spreads(width: int) -> None:
    """QᵀQ = 1, and no entry is near 1."""
    turn = orthogonal(width)
    np.testing.assert_allclose(turn.T @ turn, np.eye(width), atol=1e-12)
    assert np.abs(turn).max() <= 1.42 / np.sqrt(width)


def test_a_step_on_grids_moves_levels(decoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """A cache of 16-bit levels goes in, one place comes out; the runtime's rows are apart, and rewinding is exact."""
    model = decoder("llama grouped")
    plain = engine.lower(model, PLACES, AXES)
    graph = to_qdq(plain, observe_steps(plain, rows(3), tmp_path, lambda *_: None), model.weights)
    onnx.save(graph, tmp_path / "rounded.onnx")
    session = open_session(tmp_path / "rounded.onnx", None)
    spec = {**model.spec, "context": PLACES}
    check_graph_ends(session, ends_of_step(spec))
    zeros = cache_zeros(graph)
    step = Decoder(Graph(session), {"model": spec, "npu": {"cache_zeros": zeros}})
    ids = np.array(rows(2, 10), np.int64)
    lengths, places = np.array([10, 7]), np.tile(np.arange(10), (2, 1))
    both = step.run(step.new_cache(2), ids, np.zeros(2, np.int64), lengths, places)
    for row, count in enumerate(lengths):
        expected = prompt_logits(model, ids[row : row + 1, :count])[0]
        got = both[row, :count]
        assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < 0.1
    cache = step.new_cache(1)
    assert step.cache_bytes == sum(array.nbytes for array in cache[0].values())
    step.run(cache, ids[1:, :], np.zeros(1, np.int64), np.array([10]), places[:1, :1])  # other tokens at these places
    again = step.run(cache, ids[:1], np.zeros(1, np.int64), lengths[:1], places[:1])
    np.testing.assert_allclose(again[0], both[0], atol=1e-5)


def compiled(model: OnnxModel, folder: Path, notes: list[str] | None = None, **options: object) -> CompiledModel:
    """Compile a decoder for the NPU."""
    folder.mkdir(exist_ok=True)
    stage = Compile(**{"tokens": PLACES, **options})  # type: ignore[arg-type]
    return stage(model, dataclasses.replace(context(folder, notes), target=NPU))


@needs_provider
def test_a_decoder_on_an_npu(
    decoder: Callable[[str], OnnxModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled, all nodes but the logits' conversion on the NPU; it generates, streams and scores in the emulator."""
    from edgepipe.verify import verify_bundle

    notes: list[str] = []
    model = decoder("llama grouped")
    bundle = compiled(model, tmp_path, notes)
    assert {"decoder.onnx", "decoder_qnn.bin"} <= {path.name for path in bundle.path.iterdir()}
    npu = bundle.manifest["npu"]
    assert npu["share"] >= 0.95 and [one["node"] for one in npu["leftovers"]] == ["logits/rounded"]
    assert "a token a call, a cache of 16" in notes[0] and "as shipped in the emulator" in notes[-1]
    checks = {check["name"]: check.get("problem") for check in verify_bundle(bundle.path)["checks"]}
    assert {name for name, problem in checks.items() if problem} <= {"origin"}, checks  # the stage alone has no recipe
    loaded = load(bundle.path)
    assert isinstance(loaded, Model) and loaded.context == PLACES
    prompt = "the river"
    whole = loaded.generate(prompt, max_new_tokens=3, ignore_eos=True)
    assert len(whole.token_ids) == 3
    assert "".join(loaded.generate(prompt, max_new_tokens=3, ignore_eos=True, stream=True)) == whole.text
    sampling = {"max_new_tokens": 3, "ignore_eos": True}
    assert talk(bundle.path, prompt, sampling, threads=None, raw=True) is None
    said = capsys.readouterr()
    assert said.out.startswith(whole.text) and "This machine has no Hexagon NPU" in said.err
    ids = loaded.encode(prompt)
    expected = prompt_logits(model, np.array([ids]))[0].astype(np.float64)
    told = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    scored = loaded.token_logprobs(prompt)
    np.testing.assert_allclose(scored, told[np.arange(len(ids) - 1), ids[1:]], atol=0.3)
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    for wrong, message in (({}, "must name every past_key"), ({n: -1 for n in npu["cache_zeros"]}, "whole numbers")):
        (bundle.path / "manifest.json").write_text(
            json.dumps({**manifest, "npu": {**npu, "cache_zeros": wrong}}), encoding="utf-8"
        )
        with pytest.raises(ConfigError, match=message):
            load(bundle.path)


@needs_provider
def test_windows_that_are_shorter_than_the_cache(decoder: Callable[[str], OnnxModel], tmp_path: Path) -> None:
    """They are refused, with what would fit."""
    with pytest.raises(TargetError, match=r"layer 0 sees a window of 5 tokens.*set compile\.tokens to 5 at most"):
        compiled(decoder("mistral window"), tmp_path)
