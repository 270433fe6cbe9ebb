"""The stage prune: what it cuts is gone, what it keeps computes the same, and what can't be is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.llama import expected_weights
from edgepipe.graph.shape import read_shape
from edgepipe.pruning.importance import Kept
from edgepipe.quantizers.modules import module_of
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.stages.prune import Prune
from edgepipe.stages.quantize import Quantize
from edgepipe.students.config import StudentConfig, with_layers
from tests.decoders import all_on, context, difference, opened, random_ids, saved
from tests.encoders import save_encoder
from tests.pruning.zeroed import zeroed
from tests.students.tiny import save_tiny_student

STACK: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
STUDENTS = {
    "encoder": StudentConfig(kind="encoder", encoder=STACK),
    "encoder-decoder": StudentConfig(kind="encoder-decoder", encoder=STACK, decoder=with_layers(STACK, [0, 1])),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where this file's models lie."""
    return tmp_path_factory.mktemp("pruned")


@pytest.fixture(scope="module")
def bert(folder: Path) -> TorchModel:
    """Return a tiny BERT of 4 heads of 16, FFN 96."""
    return open_model(str(save_encoder(folder / "bert", "bert", num_hidden_layers=3)))


@pytest.fixture(scope="module")
def student(folder: Path) -> Callable[[str], TorchModel]:
    """Return a function that gives a tiny student of a kind."""

    def give(kind: str) -> TorchModel:
        path = folder / kind
        return open_model(str(path if path.exists() else save_tiny_student(path, STUDENTS[kind])))

    return give


def pruned(
    model: TorchModel, stage: Prune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TorchModel, tuple[Kept, ...], list[str]]:
    """Prune a model and return it, what its stacks kept, and the notes."""
    from edgepipe.pruning import importance

    seen: list[Any] = []
    choose = importance.choose
    monkeypatch.setattr(importance, "choose", lambda *given: seen.append(choose(*given)) or seen[-1])
    notes: list[str] = []
    return stage(model, context(folder, notes)), seen[0][0], notes


@pytest.mark.parametrize("importance", ["magnitude", "activations"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama grouped", {"ratio": 0.5}),
        ("llama biases", {"kv_heads": 4, "ffn": 33}),
        ("qwen2 tied", {"ratio": 0.5, "layers": 1}),
        ("qwen3", {"ratio": 0.5}),
        ("smollm3 windows", {"kv_heads": 3, "layers": 1}),
        ("mistral window", {"ratio": 0.4}),
        ("granite biases", {"ratio": 0.3, "layers": 1}),
        ("gemma", {"ffn": 50}),
    ],
)
def test_a_decoder_computes_what_the_whole_one_does_without_what_was_cut(
    kind: str, options: dict[str, Any], importance: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(folder, kind)
    stage = Prune(importance=importance, samples=4, tokens=16, **options)
    smaller, kept, _ = pruned(model, stage, folder, monkeypatch)
    ids = random_ids(model)
    import torch

    with torch.no_grad():
        got = module_of(smaller)(input_ids=torch.from_numpy(ids)).logits.numpy()
        expected = module_of(zeroed(model, kept))(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert difference(got, expected) < 2e-5
    assert smaller.weights.parameters < model.weights.parameters


def test_no_weight_is_left_that_the_smaller_model_does_not_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(folder, "llama grouped")
    smaller, _, notes = pruned(model, Prune(ratio=0.5, layers=1, hidden=64), folder, monkeypatch)
    shape = read_shape(smaller.info.config, None)
    assert (shape.ffn, shape.kv_heads, shape.heads, shape.layers, shape.hidden) == (50, 1, 3, 1, 64)
    assert {name: weight.shape for name, weight in smaller.weights.items()} == expected_weights(shape, tied=False)
    assert all(np.asarray(weight.load()).nbytes == weight.nbytes for weight in smaller.weights.values())
    assert any("50 of 100 FFN channels, 1 of 2 key/value groups, 64 of 96 residual channels" in note for note in notes)


def test_a_llama_whose_heads_no_longer_divide_its_width_is_written_as_mistral(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class refuses 5 heads of 16 in 112; Mistral computes the same."""
    model = opened(folder, "llama rope llama3")
    smaller, kept, _ = pruned(model, Prune(kv_heads=5, importance="magnitude"), folder, monkeypatch)
    assert smaller.info.config["model_type"] == "mistral"
    import torch

    ids = torch.from_numpy(random_ids(model))
    with torch.no_grad():
        got = module_of(smaller)(input_ids=ids).logits.numpy()
        expected = module_of(zeroed(model, kept))(input_ids=ids).logits.numpy()
    assert difference(got, expected) < 2e-5


@pytest.mark.parametrize("options", [{"ratio": 0.25}, {"ratio": 0.5, "layers": 2, "importance": "magnitude"}])
def test_bert_loses_heads_that_its_class_would_keep(
    options: dict[str, Any], bert: TorchModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads × head size is less than the width then: the module is built with fewer heads."""
    import torch

    smaller, kept, _ = pruned(bert, Prune(**options), folder, monkeypatch)
    ids = torch.from_numpy(random_ids(bert))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    with torch.no_grad():
        got = module_of(smaller)(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
        expected = bert_without(bert, kept, ids, mask)
    assert difference(got, expected) < 2e-5


def bert_without(bert: TorchModel, kept: tuple[Kept, ...], ids: Any, mask: Any) -> Any:
    """Run the whole BERT with zeroed channels, and without the layers that went: a post-norm block is no identity."""
    module = module_of(zeroed(bert, kept))
    module.encoder.layer = type(module.encoder.layer)([module.encoder.layer[i] for i in kept[0].layers])
    return module(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()


@pytest.mark.parametrize("gone", [[1], {"0": 1}, {"first": [1]}])
def test_a_config_whose_pruned_heads_are_none(gone: object, bert: TorchModel) -> None:
    info = dataclasses.replace(bert.info, config={**bert.info.config, "pruned_heads": gone})
    with pytest.raises(ConfigError, match=r"pruned_heads is .* expected lists of heads by the number of a layer"):
        module_of(dataclasses.replace(bert, info=info))


def test_a_narrower_bert_has_whole_heads(bert: TorchModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller, _, _ = pruned(bert, Prune(ratio=0.5, hidden=48), folder, monkeypatch)
    assert (smaller.info.config["num_attention_heads"], len(smaller.info.config["pruned_heads"]["0"])) == (3, 1)
    assert smaller.weights["embeddings.word_embeddings.weight"].shape == (384, 48)
    notes: list[str] = []
    exported = Export()(smaller, context(folder, notes))
    assert any(note.startswith("agrees with torch") for note in notes)
    assert {name: exported.weights[name].shape for name in exported.weights} == {
        name: weight.shape for name, weight in smaller.weights.items()
    }


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_are_pruned_in_both_stacks(
    kind: str, student: Callable[[str], TorchModel], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = student(kind)
    more = {"decoder_layers": 1} if kind == "encoder-decoder" else {}
    smaller, kept, _ = pruned(model, Prune(ratio=0.4, layers=2, **more), folder, monkeypatch)
    ids = torch.from_numpy(random_ids(model))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "encoder-decoder":
        given["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        got, expected = (module_of(one)(**given) for one in (smaller, zeroed(model, kept)))
    if kind == "encoder-decoder":
        got, expected = got.logits, expected.logits
    assert difference(got.numpy(), expected.numpy()) < 2e-5
    notes: list[str] = []
    Export(context=32)(smaller, context(folder, notes))
    assert any(note.startswith("agrees with torch") for note in notes)


def test_a_narrower_student_can_be_exported(
    student: Callable[[str], TorchModel], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller, _, _ = pruned(student("encoder-decoder"), Prune(ratio=0.0, hidden=40), folder, monkeypatch)
    notes: list[str] = []
    Export(context=32)(smaller, context(folder, notes))
    assert any(note.startswith("agrees with torch") for note in notes)


def test_codes_on_a_grid_stay_where_bits_can_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken as they are, and columns in whole groups: heads are; FFN channels are decoded."""
    plain = opened(folder, "llama grouped")
    model = all_on(plain, "4 bits groups of 16")
    smaller, _, notes = pruned(model, Prune(ratio=0.5, importance="magnitude"), folder, monkeypatch)
    assert [n for n in smaller.weights if n.startswith("model.layers.0") and smaller.weights[n].grid is None] == [
        name for name in smaller.weights if name.startswith("model.layers.0") and ("norm" in name or "down" in name)
    ]
    assert any(note.startswith("2 tensors whose columns were cut") for note in notes)
    decoded = dataclasses.replace(model, weights=model.weights.as_float32())
    other, _, _ = pruned(decoded, Prune(ratio=0.5, importance="magnitude"), folder, monkeypatch)
    for name in smaller.weights:
        assert np.array_equal(smaller.weights.float32(name), other.weights.float32(name)), name


def test_after_quantize_every_matrix_is_on_its_kind_of_grid_again(folder: Path) -> None:
    """The order quantize → prune works: what leaves a grid is rounded on it again."""
    from edgepipe.artifacts import StageRecord

    model = Quantize(bits=4, embedding_bits=8)(opened(folder, "llama grouped"), context(folder))
    model = dataclasses.replace(model, history=(StageRecord(stage="quantize", options={}, key=""),))
    smaller = Prune(ratio=0.5, importance="magnitude")(model, context(folder))
    for name, weight in smaller.weights.items():
        if len(weight.shape) == 2:
            value: Any = weight.load()
            assert (weight.dtype, value.shape, value.nbytes) == (model.weights[name].dtype, weight.shape, weight.nbytes)


@pytest.mark.parametrize("order", [["prune", "quantize"], ["quantize", "prune"]], ids="→".join)
def test_the_bundle_holds_what_is_left_and_nothing_else(order: list[str], folder: Path, tmp_path: Path) -> None:
    """Both orders, on disk: parameters and bytes are those of the smaller shapes at 4 bits, the embedding at 8."""
    from edgepipe.compress import compress
    from edgepipe.numerics.grids import quantized_nbytes
    from edgepipe.recipe import resolve
    from edgepipe.runtime import load
    from tests.listener import Silent

    source = saved(folder, "llama grouped")
    file = tmp_path / "recipe.toml"
    file.write_text(f"stages = {json.dumps([*order, 'export', 'compile'])}", encoding="utf-8")
    settings: list[tuple[str, str, object]] = [("prune", "ratio", 0.5), ("export", "context", 64)]
    recipe = resolve(target="cpu", file=file, settings=settings)
    made = compress(str(source), recipe, listener=Silent(), out=tmp_path / "bundle", runs=tmp_path / "runs")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    config = {**open_model(str(source)).info.config, "intermediate_size": 50}
    config |= {"num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": 16}
    shapes = expected_weights(read_shape(config, None), tied=False)
    assert manifest["weights"]["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    expected = {
        name: quantized_nbytes((shape[0], shape[1]), bits=8 if "embed" in name or "lm_head" in name else 4, group=32)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    held = sum(part["bytes"] for part in manifest["weights"]["parts"])
    norms = sum(4 * shape[0] for shape in shapes.values() if len(shape) == 1)
    assert held == sum(expected.values()) + norms
    assert (tmp_path / "bundle" / "weights.bin").stat().st_size < held + 64 * len(shapes)
    assert [record["stage"] for record in manifest["history"]][:2] == order
    assert manifest["source"]["sha256"] == open_model(str(source)).info.fingerprint
    bundle: Any = load(Path(made["bundle"]))
    assert isinstance(bundle.generate("The river", max_new_tokens=3).text, str)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("llama grouped", {"ratio": 0.9}, "remove all 2 key/value groups of .*: the nearest possible is 0.749"),
        ("llama grouped", {"ratio": 1.0}, "remove all 100 FFN channels of .*: the nearest possible is 0.749"),
        ("llama grouped", {"ffn": 101}, r"prune.ffn: 101 of .*'s 100 can't be kept: the most is 100"),
        ("llama grouped", {"layers": 3}, r"prune.layers: 3 of .*'s 2 can't be kept: the most is 2"),
        ("llama grouped", {"decoder_layers": 1}, "prune.decoder_layers is for encoder-decoders"),
        ("llama biases", {"kv_heads": 5}, r"5 groups are 5 query heads, .* the nearest possible is prune.kv_heads=4"),
        ("gemma", {"ratio": 0.0, "hidden": 64}, "scales its embedding by the width"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(
    kind: str, options: dict[str, Any], sentence: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options).check(opened(folder, kind))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"hidden": 50, "ratio": 0.25},
            "hidden: 50 isn't possible .* multiple of its heads' 16 .* the nearest possible is 48",
        ),
        ({"hidden": 32, "ratio": 0.25}, "takes the 3 heads that are kept: the nearest possible is 48"),
        ({"calibration": "prose-eval"}, "evaluation"),
    ],
)
def test_a_width_that_bert_cannot_have(options: dict[str, Any], sentence: str, bert: TorchModel) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options).check(bert)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 1.5}, "expected a share from 0 to below 1, got 1.5"),
        ({"ratio": -0.1}, "expected a share from 0 to below 1"),
        ({"ffn": -1}, "prune.ffn: expected at least 1"),
        ({"importance": "random"}, "prune.importance: expected one of activations, magnitude, nested, got 'random'"),
        ({"layers_by": "name"}, "prune.layers_by: expected one of contribution, spread"),
        ({"importance": "magnitude", "calibration": "everyday"}, "looks at no texts: leave it out"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options)


def test_a_family_without_a_table_is_refused_with_those_that_work(folder: Path) -> None:
    path = save_encoder(folder / "albert", "albert", embedding_size=32)
    with pytest.raises(ConfigError, match=r"no table for 'albert' .*llama, .*bert, .*edgepipe_encoder_decoder"):
        Prune().check(open_model(str(path)))


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({}, 0.25),
        ({"importance": "magnitude"}, 0.25),
        ({"pattern": "2:4"}, 0.0),
        ({"layers": 2}, 0.0),
        ({"importance": "nested", "ffn": 64}, 0.0),
        ({"layers": 2, "ratio": 0.5}, 0.5),
    ],
)
def test_a_quarter_is_cut_where_nothing_else_is_asked_for(options: dict[str, Any], ratio: float) -> None:
    assert Prune(**options).ratio == ratio
