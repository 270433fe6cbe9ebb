"""Quantize: which tensor goes on which grid, what is kept as it came, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError
from edgepipe.stages.quantize import Grid, Quantize, parse_override
from edgepipe.store import load_artifact, save_artifact
from edgepipe.weights import WeightStore
from tests.decoders import Change, changed, context, gguf_blocks, opened, stored, watched, with_minima
from tests.reference import pack_naively, round_naively
from tests.tiny_models import save_tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
FOUR_BITS: dict[str, Any] = {"activations": "dynamic", "activation_bits": 4}  # one scale a row, rounded tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    """A Llama with an untied head, biases, and rows that are no whole groups."""
    return opened(folder, "llama biases")


def quantized(model: TorchModel, notes: list[str] | None = None, **options: Any) -> WeightStore:
    """Return the weights that the stage gives."""
    return Quantize(**options)(model, context(Path(), notes)).weights


def matrices(weights: WeightStore) -> list[str]:
    """Return the names of the layers' matrices."""
    return [name for name in weights if len(weights[name].shape) == 2 and name not in (EMBEDDING, HEAD)]


def kind_of(weights: WeightStore, name: str) -> tuple[int, int, bool]:
    """Return bits, group and whether a tensor has zero points."""
    value = weights.load(name)
    assert isinstance(value, QuantizedTensor), name
    return value.bits, value.group, value.zero_points is not None


@pytest.mark.parametrize(
    ("options", "layers", "ends"),
    [
        ({}, (4, 32, False), (8, 32, False)),
        ({"bits": 8}, (8, 32, False), (8, 32, False)),
        ({"embedding_bits": 4}, (4, 32, False), (4, 32, False)),
        ({"bits": 2}, (2, 32, False), (8, 32, False)),
        ({"bits": 2, "embedding_bits": 2, "symmetric": False}, (2, 32, True), (2, 32, True)),
        ({"bits": 8, "embedding_bits": 4, "group": 128}, (8, 128, False), (4, 128, False)),
        ({"symmetric": False, "group": 16}, (4, 16, True), (8, 16, True)),
    ],
    ids=str,
)
def test_bits_and_groups(
    model: TorchModel, options: dict[str, Any], layers: tuple[int, int, bool], ends: tuple[int, int, bool]
) -> None:
    weights = quantized(model, **options)
    assert {kind_of(weights, name) for name in matrices(weights)} == {layers}
    assert {kind_of(weights, name) for name in (EMBEDDING, HEAD)} == {ends}


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_the_twins(model: TorchModel, symmetric: bool) -> None:
    weights = quantized(model, symmetric=symmetric)
    original = np.asarray(model.weights.load(DOWN))
    assert original.shape == (112, 100)
    expected = round_naively(original, 4, 32, symmetric)
    value = weights.load(DOWN)
    assert isinstance(value, QuantizedTensor)
    np.testing.assert_array_equal(value.codes, pack_naively(expected.codes, 4))
    np.testing.assert_array_equal(value.scale, expected.scale)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8, "group": 64}, {"bits": 16}], ids=str)
def test_records_describe_what_loads(model: TorchModel, options: dict[str, Any]) -> None:
    weights = quantized(model, **options)
    assert (list(weights), weights.aliases) == (list(model.weights), model.weights.aliases)
    for name, weight in weights.items():
        value = weight.load()
        assert (weight.name, weight.shape, weight.nbytes) == (name, value.shape, value.nbytes)
        assert weight.shape == model.weights[name].shape
        if isinstance(value, QuantizedTensor):
            assert (weight.dtype, weight.grid) == (f"q{value.bits}", value.source_grid)
        else:
            assert (weight.dtype, weight.grid) == (value.dtype.name, None)


def test_vectors_are_kept_as_they_are(model: TorchModel) -> None:
    """Norms and biases, whatever the bits: even a pattern that matches them doesn't change that."""
    for options in ({}, {"bits": 16}, {"overrides": ("*norm*=4", "*bias=8")}):
        weights = quantized(model, **options)
        vectors = [name for name in weights if len(weights[name].shape) == 1]
        assert len(vectors) == 5 + 2 * 7
        for name in vectors:
            assert weights[name] is model.weights[name]


def test_nothing_is_read_before_it_is_asked_for(model: TorchModel) -> None:
    store, held = watched(model.weights)
    weights = quantized(dataclasses.replace(model, weights=store))
    assert held.in_all == 0
    weights.load(UP)
    assert (held.in_all, held.now) == (1, 0)


def test_a_tied_embedding_is_quantized_once(folder: Path) -> None:
    tied = opened(folder, "llama tied")
    weights = quantized(tied)
    assert HEAD not in list(weights)
    assert weights.aliases == {HEAD: EMBEDDING}
    assert kind_of(weights, HEAD) == (8, 32, False)


def test_16_bits(model: TorchModel) -> None:
    """Matrices become float16; bfloat16 stays, since float16 hasn't its range."""
    mixed = changed(model, lambda name: lambda value: value.astype("bfloat16" if name == UP else "float32"))
    weights = quantized(mixed, bits=16)
    assert weights[UP] is mixed.weights[UP]
    assert {weights[name].dtype for name in [*matrices(weights), EMBEDDING] if name != UP} == {"float16"}
    expected = np.asarray(model.weights.load(DOWN)).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(weights.load(DOWN)), expected)
    mixed_bits = quantized(model, bits=16, embedding_bits=8)
    assert kind_of(mixed_bits, EMBEDDING) == (8, 32, False)
    assert quantized(model, bits=4, embedding_bits=16)[HEAD].dtype == "float16"


@pytest.mark.parametrize("value", [7e4, -7e4, np.inf])
def test_what_float16_cannot_hold_is_named(model: TorchModel, value: float) -> None:
    matrix = np.zeros((100, 112), np.float32)
    matrix[3, 5] = value
    weights = quantized(with_weight(model, UP, matrix), bits=16)
    with pytest.raises(StageError, match=rf"^{UP} has values beyond float16's range"):
        weights.load(UP)


def test_not_a_number_is_refused_at_16_bits_too(model: TorchModel) -> None:
    matrix = np.zeros((100, 112), np.float32)
    matrix[3, 5] = np.nan
    weights = quantized(with_weight(model, UP, matrix), bits=16)
    with pytest.raises(StageError, match=rf"^{UP} cannot be quantized: the weight has values that are not finite$"):
        weights.load(UP)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_named(model: TorchModel, value: float, dtype: str) -> None:
    matrix = np.zeros((100, 112), np.float32)
    matrix[99, 111] = value
    weights = quantized(with_weight(model, UP, matrix.astype(dtype)))
    with pytest.raises(StageError, match=rf"^{UP} cannot be quantized: .*not finite") as caught:
        weights.load(UP)
    assert "\n" not in str(caught.value)
    weights.load(DOWN)


def with_weight(model: TorchModel, name: str, value: np.ndarray) -> TorchModel:
    """Return a model with another value for one weight."""
    return dataclasses.replace(model, weights=model.weights.replace({name: stored(name, value)}))


def test_overrides(model: TorchModel) -> None:
    """The last pattern that matches wins, over the embedding's own bits too; the group is the stage's unless given."""
    overrides = ("*.down_proj.weight=8", "model.layers.1.*=8/64", "*.layers.1.mlp.up*=16", "*embed*=4/128")
    weights = quantized(model, group=16, overrides=overrides)
    assert kind_of(weights, UP) == (4, 16, False)
    assert kind_of(weights, UP.replace("up", "down")) == (8, 16, False)
    assert kind_of(weights, DOWN) == (8, 64, False)
    assert weights[UP.replace("0", "1")].dtype == "float16"
    assert kind_of(weights, EMBEDDING) == (4, 128, False)
    assert kind_of(weights, HEAD) == (8, 16, False)
    asymmetric = quantized(model, symmetric=False, overrides=("*.down_proj.weight=8",))
    assert kind_of(asymmetric, DOWN) == (8, 32, True)


@pytest.mark.parametrize("patterns", [("*.down_prj.*=8",), ("*=8", "Model.*=4", "*.down_prj.*=8"), ("lm=8",)])
def test_a_pattern_that_matches_nothing_is_refused(model: TorchModel, patterns: tuple[str, ...]) -> None:
    stage = Quantize(overrides=patterns)
    missing = ", ".join(sorted(text.partition("=")[0] for text in patterns if text != "*=8"))
    for act in (lambda: stage.check(model), lambda: stage(model, context(Path()))):
        with pytest.raises(ConfigError, match=rf"no tensor matches {missing}$".replace("*", r"\*")):
            act()


@pytest.mark.parametrize("text", ["", "=4", "*", "*=", "*=5", "*=4/33", "*=four", "*=4/32/1", "*=8.0", "*=-4"])
def test_overrides_that_say_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize\.overrides: expected PATTERN=BITS") as caught:
        Quantize(overrides=(text,))
    assert repr(text) in str(caught.value)


def test_a_pattern_may_hold_an_equals_sign() -> None:
    grid = Grid(bits=8, group=16, symmetric=False)
    assert parse_override("a=b*=8/16", Quantize(symmetric=False)) == ("a=b*", grid)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "quantize.bits: expected one of 1.58, 2, 4, 8, 16, got 5"),
        ({"bits": 0}, "quantize.bits"),
        ({"embedding_bits": 3}, "quantize.embedding_bits: expected one of 2, 4, 8, 16, got 3"),
        ({"group": 48}, "quantize.group: expected one of 16, 32, 64, 128, got 48"),
        ({"activations": "int8"}, "quantize.activations: expected one of none, dynamic, static, got 'int8'"),
        ({"ranges": "max"}, "quantize.ranges: expected one of minmax, percentile, entropy, got 'max'"),
        ({"smooth": 1.5}, r"quantize.smooth: expected 0 \(off\) to 1, got 1.5"),
        ({"smooth": 0.5}, "quantize.smooth is for rounded activations: set quantize.activations"),
        ({"ranges": "entropy"}, "quantize.ranges is for rounded activations"),
        ({"activations": "static"}, "takes symmetric 8-bit layers that are rounded to nearest: use --bits 8"),
        ({"activations": "dynamic", "bits": 8, "symmetric": False}, "takes symmetric 8-bit layers"),
        ({"activations": "dynamic", "bits": 8, "ranges": "entropy"}, "quantize.ranges is for static activations"),
        ({"activations": "dynamic", "symmetric": False}, "takes symmetric 4-bit layers"),
        ({"activations": "dynamic", "smooth": 0.5}, "takes symmetric 4-bit layers"),
        ({"activations": "dynamic", "bits": 2}, "use --bits 8, no zero points"),
        ({"activation_bits": 4}, "quantize.activation_bits is for --bits 4 with quantize.activations=dynamic"),
        ({"activation_bits": 2, "activations": "dynamic"}, "quantize.activation_bits: expected 4 or 8, got 2"),
        ({"bits": 8, "activations": "dynamic", "activation_symmetric": True}, "quantize.activation_symmetric is for"),
        ({"ternary": "mode"}, "quantize.ternary: expected one of median, mean, got 'mode'"),
        ({"ternary": "mean"}, "quantize.ternary is for --bits 1.58"),
        ({"normalize": False}, "quantize.normalize is for --bits 1.58"),
        ({"bits": 1.58}, "ternary layers are trained: give quantize.steps and quantize.data"),
        ({"bits": 1.5}, "quantize.bits: expected one of 1.58, 2, 4, 8, 16, got 1.5"),
        ({"bits": 1.58, "steps": 1, "data": "x", "symmetric": False}, "has one scale a matrix"),
        ({"bits": 1.58, "steps": 1, "data": "x", "activations": "dynamic"}, "rounds activations by itself"),
        ({"bits": 1.58, "steps": 1}, "layers are trained with data: give a file as quantize.data"),
        ({"bits": 1.58, "steps": 1, "data": "x", "agreement": 0.9}, "quantize.agreement gives single layers more bits"),
        ({"activations": "dynamic", "agreement": 0.9}, "quantize.agreement gives single layers more bits"),
        ({"steps": 1, "data": "x"}, "quantize.steps trains ternary layers, or --bits 4 with quantize.activations=dyn"),
        ({"steps": -1}, "quantize.steps: expected at least 0, got -1"),
        ({"data": "x"}, "quantize.data is for training on the grid: give quantize.steps"),
        ({"hidden": 2.0}, "quantize.hidden is for training on the grid"),
        ({"held_out": 1.0}, "quantize.held_out: expected a share between 0 and 1, got 1.0"),
        (
            {**FOUR_BITS, "steps": 1, "data": "x", "logits": 0.0, "hidden": 0.0, "attention": 0.0},
            "every loss has the weight 0",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Quantize(**options)


@pytest.fixture(scope="module")
def blocks(folder: Path) -> TorchModel:
    """A model whose matrices lie on GGUF grids of several widths, embedding and one matrix in floats."""
    path = folder / "blocks"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    grids = {"q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q5_0", "o_proj": "Q5_1", "gate_proj": "Q8_0"}
    if not path.exists():
        save_tiny_model(path, "llama", **sizes)

    def change(name: str) -> Change:
        part = name.split(".")[-2]
        return lambda value: gguf_blocks(value, grids[part]) if part in grids else value

    return changed(opened(folder, "blocks"), change)


def grids_of(weights: WeightStore) -> dict[str, str | None]:
    """Return the grid of each part of the first layer, and of the embedding."""
    parts = {name.split(".")[-2]: weights[name].grid for name in weights if ".layers.0." in name and "proj" in name}
    return {**parts, "embedding": weights[EMBEDDING].grid}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {"q_proj": "Q4_0", "k_proj": "Q4_1"}),
        ({"bits": 8}, {"q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q5_0", "o_proj": "Q5_1", "gate_proj": "Q8_0"}),
        ({"bits": 8, "group": 128, "symmetric": False, "overrides": ("*.[vo]_proj.weight=4",)},
         {"q_proj": "Q4_0", "k_proj": "Q4_1", "gate_proj": "Q8_0"}),
        ({"import_": False}, {}),
        ({"bits": 8, "import_": False}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_grid_no_wider_than_asked_is_kept(blocks: TorchModel, options: dict[str, Any], kept: dict[str, str]) -> None:
    """Kept to the bit, with its own group and offset; what is wider, or imported by nobody, is rounded anew."""
    notes: list[str] = []
    weights = quantized(blocks, notes, **options)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert grids_of(weights) == {**dict.fromkeys(parts, "rtn"), **kept, "embedding": "rtn"}
    said = [f"{2 * len(kept)} tensors kept the grid they came on, exactly"] if kept else []
    narrower = 2 * len(set(kept) - {"gate_proj"})  # all but Q8_0
    if options.get("bits") == 8 and narrower:
        said.append(f"{narrower} of them came on fewer bits than were asked for: more would bring nothing back")
    assert notes == said
    for name in weights:
        if weights[name].grid in kept.values():
            assert weights[name] is blocks.weights[name]


def test_rounding_anew_starts_from_the_decoded_values(blocks: TorchModel) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    decoded = blocks.weights.float32(name)
    value = quantized(blocks).load(name)
    assert isinstance(value, QuantizedTensor)
    np.testing.assert_array_equal(value.codes, pack_naively(round_naively(decoded, 4, 32, True).codes, 4))


def test_16_bits_decode_what_lies_on_a_grid(blocks: TorchModel) -> None:
    weights = quantized(blocks, bits=16)
    assert {weight.dtype for weight in weights.values() if len(weight.shape) == 2} == {"float16"}
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = blocks.weights.float32(name).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(weights.load(name)), expected)


def test_a_grid_that_is_not_ggufs_is_rounded_anew(model: TorchModel) -> None:
    """Only what is known to be exact counts as imported."""
    other = changed(model, lambda _name: lambda value: with_minima(value, bits=4))
    assert {weight.grid for weight in quantized(other).values() if len(weight.shape) == 2} == {"rtn"}


def test_the_input_is_untouched(model: TorchModel) -> None:
    before = dict(model.weights)
    result = Quantize()(model, context(Path()))
    assert dict(model.weights) == before
    assert result.info is model.info
    assert result.weights.origin is None


METHOD = {"method": "gptq", "samples": 8, "tokens": 16}


def test_a_method_chooses_the_layers_codes(model: TorchModel) -> None:
    """Embedding and head are rounded to nearest, what has another grid by an override gets that one, floats stay."""
    notes: list[str] = []
    weights = quantized(model, notes, **METHOD, overrides=("*.layers.0.mlp.up*=8/64", "*.layers.1.mlp.up*=16"))
    assert {weights[name].grid for name in matrices(weights)} == {"gptq", None}
    assert weights[UP].grid == "gptq" and kind_of(weights, UP) == (8, 64, False)
    assert weights[UP.replace("0", "1")].dtype == "float16"
    assert {weights[name].grid for name in (EMBEDDING, HEAD)} == {"rtn"}
    (note,) = notes
    assert re.fullmatch(r"gptq: 13 matrices in 2 blocks looked at 8 texts of 128 tokens", note)
    for weight in weights.values():
        value = weight.load()
        assert (weight.shape, weight.nbytes) == (value.shape, value.nbytes)


def test_awq_changes_norms_too(model: TorchModel) -> None:
    weights = quantized(model, **{**METHOD, "method": "awq"})
    assert {weights[name].grid for name in matrices(weights)} == {"awq"}
    assert not np.array_equal(weights.float32(NORM), model.weights.float32(NORM))
    assert weights[NORM].dtype == "float32"


def test_what_a_grid_is_kept_of_is_left_alone(blocks: TorchModel) -> None:
    notes: list[str] = []
    weights = quantized(blocks, notes, **METHOD)
    assert grids_of(weights)["q_proj"] == "Q4_0"
    assert grids_of(weights)["up_proj"] == "gptq"
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gtpq"}, "quantize.method: expected one of rtn, gptq, awq, hqq, autoround, got 'gtpq'"),
        ({"method": "gptq", "samples": 0}, "quantize.samples: expected at least 1, got 0"),
        ({"method": "gptq", "tokens": 3}, "quantize.tokens: expected at least 8, got 3"),
        ({"calibration": "everyday"}, "quantize.calibration: the method rtn looks at no texts: leave it out"),
    ],
)
def test_methods_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Quantize(**options)


def test_texts_that_cannot_be_had_are_refused_before_any_work(model: TorchModel) -> None:
    with pytest.raises(ConfigError, match=r"nosuch can't be read .*: give a file, or one of the texts everyday"):
        Quantize(method="gptq", calibration="nosuch").check(model)
    with pytest.raises(ConfigError, match="prose-eval is the evaluation set prose-eval"):
        Quantize(method="awq", calibration="prose-eval").check(model)
    without = dataclasses.replace(model, info=dataclasses.replace(model.info, tokenizer={}))
    with pytest.raises(ConfigError, match="expected a model of texts with a tokenizer"):
        Quantize(method="gptq").check(without)


def test_the_key_covers_texts_and_packages(tmp_path: Path) -> None:
    """The same name with other contents is another calibration; round-to-nearest reads nothing."""
    path = tmp_path / "own.txt"
    keys = []
    for text in ("A first text.\n", "A second text.\n"):
        path.write_text(text, encoding="utf-8")
        keys.append(Quantize(method="gptq", calibration=str(path)).reads())
    assert keys[0]["sha256"] != keys[1]["sha256"]
    assert Quantize().reads() == {}
    assert set(Quantize(method="hqq").reads()) == {"versions"}


def test_activations_decide_the_grid_of_the_layers(model: TorchModel) -> None:
    """One scale a row for the layers, groups for embedding and head; what an override names is left to its own."""
    options = {"bits": 8, "activations": "dynamic", "overrides": ("*.up_proj.weight=8/64", "*.down_proj.weight=4")}
    result = Quantize(**options)(model, context(Path()))
    assert result.activations is not None
    assert (result.activations.kind, result.activations.batches) == ("dynamic", ())
    whole = {name for name in matrices(result.weights) if kind_of(result.weights, name)[1] in (100, 112)}
    assert whole == {name for name in matrices(result.weights) if "up_proj" not in name and "down_proj" not in name}
    assert kind_of(result.weights, UP) == (8, 64, False)
    assert kind_of(result.weights, DOWN) == (4, 32, False)
    assert {kind_of(result.weights, name) for name in (EMBEDDING, HEAD)} == {(8, 32, False)}


def test_static_activations_carry_what_their_ranges_are_seen_over(model: TorchModel) -> None:
    """Smoothed matrices hold the scales of what they read, shared by those that read it, and decode to the model."""
    stage = Quantize(bits=8, activations="static", ranges="entropy", smooth=0.5, samples=3, tokens=8)
    result = stage(model, context(Path()))
    plan = result.activations
    assert plan is not None
    assert (plan.kind, plan.ranges, plan.calibration) == ("static", "entropy", "everyday")
    assert sum(len(batch["input_ids"]) for batch in plan.batches) == 3
    assert {key for batch in plan.batches for key in batch} == {"input_ids", "attention_mask"}
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    values = [result.weights.load(name) for name in (*names, UP)]
    scales = [value.column_scale for value in values if isinstance(value, QuantizedTensor)]
    assert scales[0] is not None and scales[3] is not None
    assert all(np.array_equal(scale, scales[0]) for scale in scales[1:3])
    assert not np.array_equal(scales[0], scales[3])
    for name in (*names, UP, DOWN):
        assert result.weights[name].nbytes == result.weights.load(name).nbytes
        original = np.asarray(model.weights.load(name))
        assert np.abs(result.weights.float32(name) - original).max() < 0.05 * np.abs(original).max()


def test_texts_are_checked_before_any_work(model: TorchModel) -> None:
    stage = Quantize(bits=8, activations="static", calibration="prose-eval")
    for act in (lambda: stage.check(model), stage.reads):
        with pytest.raises(ConfigError, match="prose-eval is the evaluation set prose-eval"):
            act()
    assert Quantize(bits=8, activations="dynamic").reads() == {}
    with pytest.raises(ConfigError, match="the method rtn looks at no texts"):
        Quantize(bits=8, activations="dynamic", calibration="everyday")


@pytest.mark.parametrize("options", [{}, {"activation_symmetric": True}, {"activation_bits": 8}], ids=str)
def test_rows_that_read_rounded_tokens(model: TorchModel, tmp_path: Path, options: dict[str, Any]) -> None:
    """Linear layers of blocks get a scale a row, all else the embeddings' dial; the plan says so, and is kept."""
    notes: list[str] = []
    result = Quantize(**{**FOUR_BITS, **options, "overrides": ("*.1.mlp.down_proj.weight=8/16",)})(
        model, context(Path(), notes)
    )
    assert result.activations is not None and result.activations.tokens is not None
    layers = [name for name in matrices(result.weights) if name != DOWN]
    assert sorted(result.activations.layers) == sorted(layers)
    tokens = result.activations.tokens
    assert (tokens.bits, tokens.form) == (
        options.get("activation_bits", 4),
        "signed" if "activation_symmetric" in options else "zero points",
    )
    for name in layers:
        value = result.weights.load(name)
        assert isinstance(value, QuantizedTensor) and value.has_rows and value.bits == 4
        rows, columns = value.shape
        assert value.nbytes == rows * (-(-columns // 2) + 2) == result.weights[name].nbytes
    assert kind_of(result.weights, DOWN) == (8, 16, False)
    assert kind_of(result.weights, HEAD) == kind_of(result.weights, EMBEDDING) == (8, 32, False)
    assert f"{len(layers)} matrices have one scale a row and read {tokens.bits}-bit activations" in notes[0]
    (tmp_path / "saved").mkdir()
    save_artifact(result, tmp_path / "saved", lambda *_: None)
    kept = load_artifact(tmp_path / "saved", model)
    assert isinstance(kept, TorchModel) and kept.activations is not None
    assert dataclasses.asdict(kept.activations) == dataclasses.asdict(result.activations)


def test_a_grid_that_came_along_is_not_kept_where_rows_are_asked_for(blocks: TorchModel) -> None:
    """Rounded tokens meet one scale a row; the imported grids have groups."""
    weights = quantized(blocks, **FOUR_BITS)
    assert {name: grid for name, grid in grids_of(weights).items() if name.endswith("proj")} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "rtn"
    )
