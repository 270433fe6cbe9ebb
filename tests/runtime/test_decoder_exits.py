"""Decoders with exits through their bundles: skipped layers aren't run, and nothing is lost where no token leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.decoder_exits import executed
from edgepipe.compiling.checks import one_by_one
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.runtime import Model, load, read_bundle
from edgepipe.runtime.leaving import Leaves, LeavingDecoder, above, taking
from edgepipe.runtime.onnxruntime import open_decoder, open_leaving
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.target import Target
from edgepipe.verify import verify_bundle
from tests.decoders import CONTEXT, context
from tests.leaving import EXITS, LAYERS, bundled, decoder, naive_logits, with_exits

DEPTHS = (*EXITS, LAYERS)
BOTH = Target(name="both", description="two engines", engines=("onnxruntime", "tvm"), measurable="no")
PROMPT = "The river carried the timber"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold models and bundles."""
    return tmp_path_factory.mktemp("decoder-exits")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """Make a float bundle of a Llama with exits after the first and the third of four layers."""
    return bundled(with_exits(decoder(folder, "llama grouped")), folder / "exits")[0].path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Make the bundle of the same model without exits."""
    return bundled(decoder(folder, "llama grouped"), folder / "plain")[0].path


def ids_of(count: int, vocab: int = 384) -> np.ndarray:
    """Return seeded ids [1, count]."""
    return np.random.default_rng(5).integers(0, vocab, (1, count))


def leaving(bundle: Path, rule: Leaves) -> LeavingDecoder:
    """Open the parts of a bundle with a rule."""
    manifest = read_bundle(bundle).manifest
    parts = open_leaving(bundle, manifest, 1)
    return LeavingDecoder(parts, manifest["model"], manifest["cache"]["dtype"], rule)


def whole(bundle: Path) -> Any:
    """Open the graph of all layers."""
    return open_decoder(bundle, read_bundle(bundle).manifest, 1)


def opened(bundle: Path, threshold: float | None = None) -> Model:
    """Load a bundle."""
    model = load(bundle, threads=1, exit_threshold=threshold)
    assert isinstance(model, Model)
    return model


@pytest.mark.parametrize("ways", [[2, *[0] * 8], [2, *[1] * 8], [2, 0, 1, 1, 0, 2, 0, 2, 1]])
def test_each_way_out_is_what_numpy_computes(folder: Path, bundle: Path, ways: list[int]) -> None:
    ids = ids_of(len(ways))
    decoder_ = leaving(bundle, taking(ways))
    got = one_by_one(decoder_, ids)
    expected = naive_logits(with_exits(decoder(folder, "llama grouped")), ids[0].tolist(), ways)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    counts = {depth: ways.count(way) for way, depth in enumerate(DEPTHS)}
    assert decoder_.tokens_by_depth == counts


def test_the_first_token_never_leaves(bundle: Path, plain: Path) -> None:
    """All later ones look at it."""
    decoder_ = leaving(bundle, above(0.0))
    got, expected = one_by_one(decoder_, ids_of(1)), one_by_one(whole(plain), ids_of(1))
    assert np.array_equal(got, expected)
    assert decoder_.tokens_by_depth == dict(zip(DEPTHS, (0, 0, 1), strict=True))


def test_skipped_layers_have_keys_and_values_that_later_tokens_see(bundle: Path) -> None:
    """Else a token that goes through all layers after one that left would read zeros there."""
    ids, ways = ids_of(4), [2, 0, 0, 2]
    filled = leaving(bundle, taking(ways))
    expected = one_by_one(filled, ids)[-1]
    cache = filled.new_cache(1)
    again = leaving(bundle, taking(ways))
    for place in range(4):
        if place == 3:
            for name, buffer in cache[0].buffers.items():
                if int(name.partition(".")[2]) >= EXITS[0]:
                    buffer[0, :, 1:3] = 0
        got = again.run(cache, ids[:, [place]], np.array([place]), np.array([1]), np.array([[0]]))
    assert np.abs(got[0, 0] - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "bits", "level", "cache", "activations"),
    [
        ("llama grouped", 16, 0, "float16", "none"),
        ("qwen3 windows", 4, 4, "float16", "none"),
        *(
            pytest.param(*form, marks=pytest.mark.slow)
            for form in (
                ("llama tied", 8, 0, "float32", "none"),
                ("llama biases", 4, 0, "float16", "none"),
                ("smollm3 windows", 8, 4, "float16", "none"),
                ("granite", 8, 0, "float16", "dynamic"),
                ("gemma", 16, 0, "float32", "none"),
            )
        ),
    ],
)
def test_where_none_leaves_it_is_the_whole_model_bit_by_bit(
    folder: Path, kind: str, bits: int, level: int, cache: str, activations: str
) -> None:
    """The parts, all run, and the very file of the decoder: exits change neither."""
    name = f"{kind}-{bits}-{level}-{activations}".replace(" ", "-")
    form: dict[str, Any] = {"level": level, "cache": cache, "activations": activations}
    made, _, notes = bundled(with_exits(decoder(folder, kind)), folder / name, bits, **form)
    alone = bundled(decoder(folder, kind), folder / f"{name}-alone", bits, **form)[0]
    assert (made.path / "decoder.onnx").read_bytes() == (alone.path / "decoder.onnx").read_bytes()
    ids = ids_of(20)
    expected = one_by_one(whole(alone.path), ids)
    by_parts = leaving(made.path, above(1.0))
    assert np.array_equal(one_by_one(by_parts, ids), expected)
    assert by_parts.tokens_by_depth == dict(zip(DEPTHS, (0, 0, 20), strict=True))
    assert any("tokens that leave at the exits agree with the portable graphs" in note for note in notes)


def test_a_prompt_goes_through_all_layers(bundle: Path, plain: Path) -> None:
    """Also in pieces, and its cache is the whole model's: only single tokens leave."""
    ids, decoder_ = ids_of(12), leaving(bundle, above(0.0))
    expected = one_by_one(whole(plain), ids)
    cache = decoder_.new_cache(1)
    for start, end in ((0, 7), (7, 12)):
        count = end - start
        last = np.array([[count - 1]])
        got = decoder_.run(cache, ids[:, start:end], np.array([start]), np.array([count]), last)
        np.testing.assert_allclose(got[0, 0], expected[end - 1], atol=1e-4 * np.abs(expected).max())
    assert sum(decoder_.tokens_by_depth.values()) == 0
    step = decoder_.run(cache, ids[:, :1], np.array([12]), np.array([1]), np.array([[0]]))
    assert step.shape == (1, 1, 384)
    assert decoder_.tokens_by_depth == dict(zip(DEPTHS, (1, 0, 0), strict=True))


def test_thresholds_of_a_loaded_bundle(bundle: Path, plain: Path) -> None:
    """1, and nothing, are the whole model; between, tokens leave where a gate says so; 0 leaves at the first exit."""
    expected = opened(plain).generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert opened(bundle).generate(PROMPT, max_new_tokens=12, ignore_eos=True) == expected
    at_one = opened(bundle, 1)
    assert at_one.generate(PROMPT, max_new_tokens=12, ignore_eos=True) == expected
    assert np.array_equal(at_one.logits(PROMPT), opened(plain).logits(PROMPT))
    assert at_one.tokens_by_depth == {}
    means = []
    for threshold in (0, 0.3, 0.5, 0.7, 0.999999):
        model = opened(bundle, threshold)
        assert len(model.token_logprobs(PROMPT)) == len(model.encode(PROMPT)) - 1
        left = model.tokens_by_depth
        assert sum(left.values()) == len(model.encode(PROMPT)) - 1  # each scored as if it had been generated
        means.append(sum(depth * count for depth, count in left.items()) / sum(left.values()))
    count = len(opened(bundle).encode(PROMPT)) - 1
    assert means[0] == (EXITS[0] * (count - 1) + LAYERS) / count
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_batches_streams_and_kept_prompts_are_single_answers(bundle: Path) -> None:
    model = opened(bundle, 0.5)
    prompts = [PROMPT, "Every spring", "Numbers such as 12"]
    single = [model.generate(one, max_new_tokens=9, ignore_eos=True, reuse_prefix=False) for one in prompts]
    batch = model.generate(prompts, max_new_tokens=9, ignore_eos=True)
    assert [one.token_ids for one in batch] == [one.token_ids for one in single]
    pieces = "".join(model.generate(PROMPT, max_new_tokens=9, ignore_eos=True, stream=True))
    assert pieces == single[0].text
    assert 0 < model.tokens_by_depth[LAYERS] < sum(model.tokens_by_depth.values())


def test_skipped_layers_are_not_run(bundle: Path) -> None:
    """Attention and MLP are one operator a layer that was run; at the first exit fewer run than of the whole model."""
    ids = ids_of(8)[0].tolist()
    totals = {}
    for threshold in (0.0, 0.5, 1.0):
        operators, ran = executed(bundle, threshold, ids)
        assert operators["GroupQueryAttention"] == operators["QuickGelu"] == ran
        totals[threshold] = ran, operators.total()
    assert totals[0.0][0] == EXITS[0] * (len(ids) - 1) + LAYERS
    assert totals[1.0][0] == LAYERS * len(ids)
    assert totals[0.0][0] < totals[0.5][0] < totals[1.0][0]
    assert totals[0.0][1] < totals[1.0][1]


def test_bytes_are_those_of_the_exits_and_of_keys_and_values_once_more(folder: Path, bundle: Path, plain: Path) -> None:
    model = with_exits(decoder(folder, "llama grouped"))
    added = sum(weight.size for name, weight in model.weights.items() if name.startswith("exits."))
    twice = sum(
        model.weights[f"model.layers.{i}.self_attn.{part}_proj.weight"].size
        for i in range(EXITS[0], LAYERS)
        for part in ("k", "v")
    )
    sizes = [(path / "weights.bin").stat().st_size for path in (bundle, plain)]
    assert 0 <= sizes[0] - sizes[1] - 4 * (added + twice) < 4096  # places are rounded up


def test_a_bundle_that_was_damaged_is_refused(bundle: Path, tmp_path: Path) -> None:
    verify_bundle(bundle)
    for number, (change, sentence) in enumerate(
        (
            (lambda m: m["model"].update(exits=[3, 1]), "model.exits must be growing numbers"),
            (lambda m: m["model"].update(exits=[1, 4]), "model.exits must be growing numbers"),
            (lambda m: m["graphs"].pop("fill_2"), "graphs must name fill_2"),
            (lambda m: m["graphs"].pop("head"), "graphs must name head"),
            (lambda m: m.update(engine="tvm"), "is for onnxruntime"),
        )
    ):
        copy = shutil.copytree(bundle, tmp_path / str(number))
        manifest = json.loads((copy / "manifest.json").read_text())
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ConfigError, match=sentence):
            load(copy, exit_threshold=0.5)
    copy = shutil.copytree(bundle, tmp_path / "swapped")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["graphs"] |= {"fill_1": "fill_2.onnx", "fill_2": "fill_1.onnx"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ContractError, match=r"new_key"):
        load(copy, exit_threshold=0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, "0.5", True])
def test_thresholds_out_of_range_are_refused(bundle: Path, threshold: Any) -> None:
    with pytest.raises(ConfigError, match="exit_threshold must be a number from 0 to 1"):
        load(bundle, exit_threshold=threshold)


def test_a_bundle_without_exits_takes_no_threshold(plain: Path) -> None:
    with pytest.raises(ConfigError, match="this bundle's model has no exits"):
        load(plain, exit_threshold=0.5)
    assert opened(plain).tokens_by_depth == {}


def test_what_cannot_be_compiled_is_refused(folder: Path, tmp_path: Path) -> None:
    exported = Export(context=CONTEXT)(with_exits(decoder(folder, "llama")), context(tmp_path))
    with pytest.raises(TargetError, match="a decoder with exits runs on onnxruntime, and the recipe asks for tvm"):
        Compile(engine="tvm")(exported, dataclasses.replace(context(tmp_path), target=BOTH))
    with pytest.raises(TargetError, match="fills in keys and values as floats"):
        Compile(cache_dtype="int8")(exported, context(tmp_path))


def test_a_config_with_exits_that_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    for exits in ([2, 1], [4], [0, 1], ["1"], 3):
        model = with_exits(decoder(folder, "llama"))
        model.info.config["exits"] = exits
        with pytest.raises(ConfigError, match="exits"):
            Export(context=CONTEXT)(model, context(tmp_path))
