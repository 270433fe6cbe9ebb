"""Student bundles in an app: answers, scores, embeddings and classes are torch's; damage is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime import Encoder, Model, load
from edgepipe.sources import open_model
from edgepipe.students.config import read_student
from edgepipe.students.files import load_student
from edgepipe.students.models import EncoderDecoder
from edgepipe.verify import verify_bundle
from tests.reference import choice_scores_naively
from tests.runtime.damages import own_up
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

PROMPTS = ["The river carried the timber", "Mill", "Every spring the water rose, and every spring somebody said it."]
TOKENS = 12
FLOATS = (("quantize", "bits", 16), ("compile", "cache_dtype", "float32"))
KINDS = ("untied", "narrow decoder")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save tiny students whose matrices are 16-bit numbers, so that a 16-bit bundle computes the same."""
    folder = tmp_path_factory.mktemp("students")
    found = {}
    for name in (*KINDS, "classes", "latent"):
        found[name] = save_tiny_student(folder / name.replace(" ", "-"), {**PAIRS, **ENCODERS}[name])
        _halve(found[name] / "model.safetensors")
    return found


def _halve(file: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = {name: value.astype(np.float16) if value.ndim == 2 else value for name, value in load_file(file).items()}
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def bundles(sources: dict[str, Path], build_tiny: Callable[..., Path]) -> dict[str, Path]:
    """Send them down the pipeline."""
    return {name: build_tiny(path, *FLOATS) for name, path in sources.items()}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, bundles: dict[str, Path], sources: dict[str, Path]) -> Any:
    """Load a bundle, and torch's module."""
    module = load_student(sources[request.param]).eval()
    assert isinstance(module, EncoderDecoder)
    model = load(bundles[request.param], threads=1)
    assert isinstance(model, Model)
    return model, module


def state_of(module: EncoderDecoder, ids: list[int]) -> Any:
    """Read a source."""
    source = torch.tensor([ids])
    return module.start(source, torch.ones_like(source))


def theirs(module: EncoderDecoder, ids: list[int]) -> list[int]:
    """Return torch's greedy answer, without the start token and up to the end token."""
    found: list[int] = []
    with torch.inference_mode():
        state, token = state_of(module, ids), 0
        while len(found) < TOKENS:
            token = int(module.step(state, torch.tensor([[token]]))[0][0, -1].argmax())
            if token == 1:
                break
            found.append(token)
    return found


@pytest.mark.parametrize("name", [*KINDS, "classes", "latent"])
def test_bundles_are_verified(name: str, bundles: dict[str, Path]) -> None:
    """Three graphs over a preallocated cache, or one without; all of them are opened."""
    assert [check for check in verify_bundle(bundles[name])["checks"] if check["ok"] is not True] == []


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_are_torch_s(pair: Any, prompt: str) -> None:
    """Token by token, up to the same end."""
    model, module = pair
    answer = model.generate(prompt, max_new_tokens=TOKENS)
    assert list(answer.token_ids) == theirs(module, model.encode(prompt))
    assert answer.prompt_tokens == len(model.encode(prompt)) and answer.reused_tokens == 0


def test_a_stream_a_batch_and_sampling(pair: Any) -> None:
    """Rows with sources of any lengths; the same seed draws the same tokens alone and streamed."""
    model, _ = pair
    alone = [model.generate(prompt, max_new_tokens=TOKENS) for prompt in PROMPTS]
    assert len({one.token_ids for one in alone}) > 1
    assert [one.token_ids for one in model.generate(PROMPTS, max_new_tokens=TOKENS)] == [o.token_ids for o in alone]
    for prompt, one in zip(PROMPTS, alone, strict=True):
        assert "".join(model.generate(prompt, max_new_tokens=TOKENS, stream=True)) == one.text
    drawn = [model.generate(PROMPTS[0], temperature=1.0, seed=seed, max_new_tokens=TOKENS) for seed in (1, 1, 2)]
    assert drawn[0].token_ids == drawn[1].token_ids != drawn[2].token_ids


def test_scores_are_torch_s(pair: Any) -> None:
    """Log p among the choices at the first token, by ids or by their texts, of one source or several."""
    model, module = pair
    texts = ["a", "b", "q"]
    choices = [model.tokenizer.encode(text, add_special_tokens=False)[0] for text in texts]
    expected = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            logits = module.step(state_of(module, model.encode(prompt)), torch.tensor([[0]]))[0][0, -1]
        expected.append(choice_scores_naively(logits.tolist(), choices))
    got = model.score(PROMPTS, choices)
    assert got.shape == (3, 3) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(got).sum(1), 1)
    np.testing.assert_array_equal(model.score(PROMPTS[1], texts), got[1])


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([3], "at least two ids or texts of one token each"),
        ("ab", "at least two ids or texts"),
        (["a", "timber and boards"], "'timber and boards' has"),
        ([3, 384], "token id 384 is not in the model's vocabulary of 384"),
        ([3, -1], "token id -1 is not in"),
        ([3, 1.5], "expected a text or a list of token ids"),
    ],
)
def test_choices_that_are_none(bundles: dict[str, Path], choices: Any, words: str) -> None:
    """Each is one sentence."""
    model = load(bundles["untied"], threads=1)
    assert isinstance(model, Model)
    with pytest.raises(ConfigError, match=words):
        model.score("Mill", choices)


def test_a_model_without_a_source_scores_none(float_bundle: Path) -> None:
    """A decoder has log-probabilities of a text's tokens instead."""
    model = load(float_bundle, threads=1)
    assert isinstance(model, Model)
    with pytest.raises(ConfigError, match="continues its prompt and has no source to score: use token_logprobs"):
        model.score("Mill", [1, 2])


def test_sources_that_do_not_fit(pair: Any) -> None:
    """Too long for the encoder, or to be scored as a text."""
    model, _ = pair
    with pytest.raises(ConfigError, match=r"shorten it to 128 .that is what its encoder reads"):
        model.generate("river " * 500)
    with pytest.raises(ConfigError, match="answers a source: it scores no text by itself"):
        model.logits("The river")


def test_classes_and_embeddings(bundles: dict[str, Path], sources: dict[str, Path]) -> None:
    """Labels come out in the order of the logits; embeddings over latents have length 1."""
    classifier, embedder = (load(bundles[name], threads=1) for name in ("classes", "latent"))
    assert isinstance(classifier, Encoder) and isinstance(embedder, Encoder)
    assert classifier.labels == ("no", "maybe", "yes")
    modules: Any = [load_student(sources[name]).eval() for name in ("classes", "latent")]
    for prompt, logits, vector in zip(PROMPTS, classifier.classify(PROMPTS), embedder.embed(PROMPTS), strict=True):
        assert embedder.tokenizer is not None
        ids = torch.tensor([embedder.tokenizer.encode(prompt)])
        with torch.inference_mode():
            expected = [module(ids, torch.ones_like(ids))[0].numpy() for module in modules]
        np.testing.assert_allclose(logits, expected[0], atol=1e-4)
        np.testing.assert_allclose(vector, expected[1], atol=1e-4)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_verbs(bundles: dict[str, Path], tmp_path: Path) -> None:
    """inspect, run and eval take a student's bundle as any other."""
    bundle = str(bundles["untied"])
    facts = _json_of("inspect", bundle)
    assert (facts["layers"], facts["encoder_layers"], facts["task"]) == (1, 2, "text2text-generation")
    result = CliRunner().invoke(main, ["run", bundle, PROMPTS[0], "--max-new-tokens", "5"])
    model = load(bundle, threads=1)
    assert isinstance(model, Model)
    assert result.exit_code == 0 and result.stdout.strip() == model.generate(PROMPTS[0], max_new_tokens=5).text.strip()
    data = tmp_path / "data.jsonl"
    answers = model.generate(PROMPTS, max_new_tokens=6)
    rows = [{"input": p, "reference": a.text.strip()} for p, a in zip(PROMPTS, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for metric in ("bleu", "rouge", "exact"):
        found = _json_of("eval", bundle, "--metric", metric, "--data", str(data), "--max-new-tokens", "6")
        assert found["value"] == pytest.approx(100 if metric == "bleu" else 1), metric


def _json_of(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _without(role: str) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: dict[str, Any]) -> None:
        manifest["graphs"].pop(role)

    return damage


def _with(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: dict[str, Any]) -> None:
        manifest["model"][key] = value

    return damage


def _swapped(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: dict[str, Any]) -> None:
        graphs = manifest["graphs"]
        graphs[first], graphs[second] = graphs[second], graphs[first]

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("encoder"), "graphs must name encoder"),
        (_with("source_context", 0), "model.source_context"),
        (_with("source_context", None), "model.source_context"),
        (_with("decoder_prefix_ids", [384]), "decoder_prefix_ids must be a list of ids below 384"),
        (_with("kv_heads", 1), "should be tensor"),
        (_with("layers", 2), "is missing: build the bundle again"),
        (_swapped("encoder", "scorer"), "is (missing|one too many): build the bundle again"),
        (_swapped("decoder", "encoder"), "is (missing|one too many): build the bundle again"),
    ],
)
def test_manifests_that_lie_are_refused(bundles: dict[str, Path], tmp_path: Path, damage: Any, words: str) -> None:
    """Before anything is run, with one sentence."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundles["untied"], copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    damage(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises((ConfigError, ContractError), match=words):
        load(copy, threads=1)
    assert any(check["ok"] is False for check in verify_bundle(copy)["checks"])


def test_a_scorer_that_is_another_graph_is_seen(bundles: dict[str, Path], tmp_path: Path) -> None:
    """It is opened when it is needed, and when the bundle is verified."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundles["untied"], copy)
    shutil.copy(copy / "encoder.onnx", copy / "scorer.onnx")
    own_up(copy)
    model = load(copy, threads=1)
    assert isinstance(model, Model)
    model.generate("Mill", max_new_tokens=2)
    with pytest.raises(ContractError, match="build the bundle again"):
        model.score("Mill", [1, 2])
    failed = [check for check in verify_bundle(copy)["checks"] if check["ok"] is False]
    assert [check["name"] for check in failed] == ["graph"]


def test_the_config_travels(sources: dict[str, Path]) -> None:
    """What was saved is what is opened."""
    for name in KINDS:
        assert read_student(open_model(str(sources[name])).info.config).kind == "encoder-decoder"
