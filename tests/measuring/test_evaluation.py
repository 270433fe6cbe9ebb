"""A whole evaluation: options checked before anything runs, figures of real bundles, what stands beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import ConfigError, StageError
from edgepipe.measuring import evaluation
from edgepipe.measuring.evaluation import evaluate_bundle
from edgepipe.measuring.metrics import METRICS, Evaluation
from edgepipe.measuring.worker import measure_perplexity
from edgepipe.runtime import load
from tests.reference import spearman_naively

INPUTS = ["The river carried", "The mill", "Every spring the water", "so do names"]


def quiet(what: str, done: int, total: int) -> None:
    """Hear nothing."""


def run(bundle: Path, data: str | Path, against: Path | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate without progress."""
    return evaluate_bundle(bundle, str(data), Evaluation(threads=1, **options), progress=quiet, against=against)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """Write the tiny tokenizer's own text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text * 2, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """Write what the 4-bit bundle answers to three inputs, and something else for the fourth."""
    model = load(tiny_bundle, threads=1)
    lines = [json.dumps({"input": i, "reference": model.generate(i, max_new_tokens=24).text}) for i in INPUTS[:3]]
    lines.append(json.dumps({"input": INPUTS[3], "reference": ["other words", "entirely"]}))
    file = tmp_path_factory.mktemp("answered") / "inputs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"metric": "perplexty"},
            r"unknown metric 'perplexty' \(did you mean 'perplexity'\?\): known are perplexity, kl",
        ),
        ({"metric": "perplexity", "tokens": 1}, "--tokens: expected at least 2, or 0"),
        ({"metric": "perplexity", "tokens": -1}, "--tokens: expected at least 0, got -1"),
        ({"metric": "perplexity", "window": 1}, "--window: expected at least 2, got 1"),
        ({"metric": "perplexity", "stride": 600}, "--stride: expected at most the window of 512 tokens, got 600"),
        (
            {"metric": "perplexity", "limit": 5},
            "--limit means nothing for perplexity, but for spearman, accuracy, bleu",
        ),
        ({"metric": "kl-to-float", "chat": True}, "--chat means nothing for kl-to-float, but for accuracy, bleu"),
        ({"metric": "spearman", "max_new_tokens": 5}, "--max-new-tokens means nothing for spearman"),
        ({"metric": "exact", "labels": "a=b"}, "--labels means nothing for exact, but for accuracy$"),
        ({"metric": "exact", "batch": 0}, "--batch: expected at least 1"),
        ({"metric": "exact", "prompt": "hello"}, r"--prompt: expected \{text\} where the example goes, got 'hello'"),
        ({"metric": "exact", "stop": ("",)}, "--stop: expected texts"),
        ({"metric": "exact", "seed": -1}, "--seed: expected at least 0"),
        ({"metric": "spearman", "columns": "score"}, "--columns: expected name=value,name=value"),
        ({"metric": "spearman", "columns": "skore=1"}, r"spearman reads score, first, second, not 'skore' \(did you"),
        ({"metric": "spearman", "columns": "score=1,score=2"}, "with every name once"),
        ({"metric": "accuracy", "labels": "0=a,1=a"}, "--labels: expected different words for each label"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Evaluation(**options)


def test_columns_are_the_metric_s_where_nothing_is_said() -> None:
    options = Evaluation(metric="spearman", columns="score=similarity")
    assert options.places(".tsv").places == {"score": "similarity", "first": "5", "second": "6"}
    assert options.places(".jsonl").places["first"] == "sentence1"
    assert Evaluation(metric="accuracy", labels="0=a=b, 1 = c").label_words() == {"0": "a=b", "1": "c"}


def test_every_metric_has_its_row() -> None:
    names = {metric.name for metric in METRICS}
    assert names == {"perplexity", "spearman", "accuracy", "bleu", "rouge", "exact", "kl-to-float"}


# ---------------------------------------------------------------------------------------------------------------------
# texts


def test_perplexity_is_measure_s(tiny_bundle: Path, text: Path) -> None:
    """The same windows, the same figure, wherever it is asked for."""
    found = run(tiny_bundle, text, metric="perplexity", tokens=300)
    expected = measure_perplexity(tiny_bundle, text.read_text(encoding="utf-8"), 1, 300)
    assert found["value"] == pytest.approx(expected["perplexity"], rel=1e-12)
    assert found["details"] == {"tokens": expected["tokens"], "window_tokens": expected["window_tokens"]}
    assert (found["count"], found["over"], found["better"]) == (3, "windows", "lower")
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_a_stride_scores_more_tokens_with_more_before_them(tiny_bundle: Path, text: Path) -> None:
    apart = run(tiny_bundle, text, metric="perplexity", tokens=200, window=50)
    sliding = run(tiny_bundle, text, metric="perplexity", tokens=200, window=50, stride=10)
    assert (apart["details"]["tokens"], sliding["details"]["tokens"]) == (196, 199)
    ids = load(tiny_bundle).encode(text.read_text(encoding="utf-8"))[:200]
    logprobs = [*load(tiny_bundle).token_logprobs(ids[:50])]
    for end in range(60, 201, 10):
        logprobs += [*load(tiny_bundle).token_logprobs(ids[end - 50 : end])[-10:]]
    assert sliding["value"] == pytest.approx(np.exp(-np.mean(logprobs)), rel=1e-4)


def test_one_window_has_no_interval(tiny_bundle: Path, float_bundle: Path, text: Path) -> None:
    found = run(tiny_bundle, text, float_bundle, metric="perplexity", tokens=100)
    assert (found["interval"], found["against"]["difference"]["verdict"]) == (None, None)


def test_another_bundle_is_compared_window_by_window(tiny_bundle: Path, float_bundle: Path, text: Path) -> None:
    found = run(tiny_bundle, text, float_bundle, metric="perplexity")
    other = found["against"]
    assert other["value"] == run(float_bundle, text, metric="perplexity")["value"]
    assert other["difference"]["value"] == found["value"] - other["value"]
    assert other["bundle"]["bits_per_weight"] > 16 > found["bundle"]["bits_per_weight"]
    same = run(tiny_bundle, text, tiny_bundle, metric="perplexity")["against"]
    assert same["difference"] == {"value": 0, "interval": [0, 0], "verdict": "tie"}


def test_divergence_from_the_float_bundle(tiny_bundle: Path, float_bundle: Path, text: Path) -> None:
    found = run(tiny_bundle, text, float_bundle, metric="kl-to-float", tokens=300)
    details = found["details"]
    assert 0 < details["kl_median"] < details["kl_p99"] <= details["kl_max"]
    assert found["value"] > 1e-3 and 0.2 < details["top1_agreement"] < 1
    assert details["perplexity"] == pytest.approx(run(tiny_bundle, text, metric="perplexity", tokens=300)["value"])
    assert details["perplexity_of_reference"] != pytest.approx(details["perplexity"], rel=1e-3)
    assert set(found["against"]) == {"bundle"}
    itself = run(float_bundle, text, float_bundle, metric="kl-to-float", tokens=300)
    assert (itself["value"], itself["details"]["top1_agreement"]) == (0, 1)


def test_what_can_t_be_compared_is_refused(
    tiny_bundle: Path, text: Path, tmp_path: Path, build_tiny: Callable[..., Path]
) -> None:
    from tests.tiny_models import save_tiny_model

    with pytest.raises(ConfigError, match="kl-to-float compares with a float bundle: name one with --against"):
        run(tiny_bundle, text, metric="kl-to-float")
    larger = build_tiny(save_tiny_model(tmp_path / "larger", "llama", vocab_size=400))
    with pytest.raises(ConfigError, match="have vocabularies of different sizes"):
        run(tiny_bundle, text, larger, metric="kl-to-float")
    with pytest.raises(ConfigError, match="have different tokenizers: their tokens can't be compared"):
        run(tiny_bundle, text, larger, metric="perplexity")
    one = tmp_path / "one.txt"
    one.write_text("a")
    with pytest.raises(ConfigError, match=r"one\.txt: expected a text of at least 2 tokens"):
        run(tiny_bundle, one, metric="perplexity")


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_exact_match_of_its_own_answers(tiny_bundle: Path, float_bundle: Path, answered: Path) -> None:
    found = run(tiny_bundle, answered, float_bundle, metric="exact", max_new_tokens=24, batch=1)
    assert (found["value"], found["count"], found["details"]["references"]) == (0.75, 4, 5)
    assert found["details"]["answers"][0]["input"] == INPUTS[0]
    assert found["against"]["value"] < 0.75
    assert found["against"]["difference"]["value"] == 0.75 - found["against"]["value"]


def test_bleu_and_rouge_of_its_own_answers(tiny_bundle: Path, answered: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval isn't installed: make test brings it")
    pytest.importorskip("rouge_score", reason="the extra eval isn't installed: make test brings it")
    bleu = run(tiny_bundle, answered, metric="bleu", max_new_tokens=24, batch=1)
    assert 30 < bleu["value"] < 100
    assert "nrefs:var" in bleu["details"]["signature"] and bleu["versions"]["sacrebleu"] in bleu["details"]["signature"]
    rouge = run(tiny_bundle, answered, metric="rouge", max_new_tokens=24, batch=1)
    assert rouge["value"] == rouge["details"]["rougeL"]["value"] > 0.5
    assert rouge["interval"] == rouge["details"]["rougeL"]["interval"]


def test_accuracy_of_a_text_model(tiny_bundle: Path, tmp_path: Path) -> None:
    """Labels taken from the bundle's own choice are all right, the others all wrong."""
    words, texts = {"a": "river", "b": "mill"}, ["Every spring", "The mill turned it into", "Numbers such as"]
    model = load(tiny_bundle, threads=1)
    labels = []
    for text in texts:
        total = {k: model.token_logprobs(f"{text} {w}")[len(model.encode(text)) - 1 :].sum() for k, w in words.items()}
        labels.append(max(total, key=lambda label: total[label]))
    options = {"metric": "accuracy", "labels": "a=river,b=mill", "prompt": "{text} "}
    file = tmp_path / "labelled.tsv"
    file.write_text("".join(f"{t}\t{label}\n" for t, label in zip(texts, labels, strict=True)))
    found = run(tiny_bundle, file, **options)
    assert (found["value"], found["count"], found["interval"]) == (1, 3, [1, 1])
    assert found["details"] == {"majority": max(labels.count("a"), labels.count("b")) / 3, "prompts_cut": 0}
    file.write_text("".join(f"{t}\t{'ab'[label == 'a']}\n" for t, label in zip(texts, labels, strict=True)))
    assert run(tiny_bundle, file, **options)["value"] == 0
    for missing in ("labels", "prompt"):
        with pytest.raises(ConfigError, match="needs the words of every label and a prompt: give both"):
            run(tiny_bundle, file, **{key: value for key, value in options.items() if key != missing})


def test_a_limit_draws_with_the_seed(tiny_bundle: Path, answered: Path) -> None:
    drawn = {
        run(tiny_bundle, answered, metric="exact", limit=1, seed=seed, max_new_tokens=1)["details"]["answers"][0][
            "input"
        ]
        for seed in range(8)
    }
    assert len(drawn) > 1
    found = run(tiny_bundle, answered, metric="exact", limit=3, max_new_tokens=1)
    assert (found["count"], found["settings"]["limit"], found["settings"]["seed"]) == (3, 3, 0)
    assert found["settings"]["columns"] == {"input": "input", "reference": "reference"}


def test_chat_without_a_template_is_refused(tiny_bundle: Path, answered: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    manifest["tokenizer"]["chat_template"] = None
    (tmp_path / "plain" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has no chat template: leave --chat out"):
        run(tmp_path / "plain", answered, metric="exact", chat=True)


class Encoder:
    """Stand for an encoder's bundle, loaded: letters counted."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return how often some letters are there."""
        return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32)

    def classify(self, texts: list[str]) -> np.ndarray:
        """Return the same as logits."""
        return self.embed(texts)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let evaluations find an encoder: the arithmetic around it is what is tested."""
    monkeypatch.setattr(evaluation, "_open", lambda path, options: Encoder())


@pytest.mark.usefixtures("encoder")
def test_spearman_of_embeddings(tiny_bundle: Path, tmp_path: Path) -> None:
    pairs = [("abc", "abd", 3.5), ("aaa", "bbb", 0.0), ("ace", "ace", 5.0), ("fed", "fad", 3.0), ("bb", "bbc", 4.0)]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{score}\t{first}\t{second}\n" for first, second, score in pairs))
    found = run(tiny_bundle, file, metric="spearman", columns="score=0,first=1,second=2", batch=2)
    embed = Encoder().embed
    cosines = [
        float(a @ b / np.sqrt((a @ a) * (b @ b)))
        for a, b in zip(embed([p[0] for p in pairs]), embed([p[1] for p in pairs]), strict=True)
    ]
    assert found["value"] == pytest.approx(spearman_naively(np.round(cosines, 6), [p[2] for p in pairs]))
    assert (found["count"], found["over"], found["better"]) == (5, "pairs", "higher")
    file.write_text("1\txyz\tabc\n2\tz\td\n3\tx\te\n")
    with pytest.raises(StageError, match="spearman is nan, since every pair has the same similarity"):
        run(tiny_bundle, file, metric="spearman", columns="score=0,first=1,second=2")


@pytest.mark.usefixtures("encoder")
def test_what_an_encoder_can_and_can_t(tiny_bundle: Path, answered: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.tsv"
    file.write_text("aab\tA\nbba\tB\ncc\tA\n")
    found = run(tiny_bundle, file, metric="accuracy", labels="A=0,B=1")
    assert (found["value"], found["details"]) == (pytest.approx(2 / 3), {"majority": pytest.approx(2 / 3)})
    with pytest.raises(ConfigError, match=r"--prompt and --chat mean nothing for .*, which classifies"):
        run(tiny_bundle, file, metric="accuracy", labels="A=0,B=1", prompt="{text}?")
    with pytest.raises(ConfigError, match="exact needs a bundle that generates text, but"):
        run(tiny_bundle, answered, metric="exact")
    with pytest.raises(ConfigError, match="perplexity needs a bundle that predicts text, but"):
        run(tiny_bundle, text, metric="perplexity")


def test_a_text_model_doesn_t_embed(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"score": 1, "sentence1": "a", "sentence2": "b"}\n{"score": 2, "sentence1": "a", "sentence2": "b"}'
    )
    with pytest.raises(ConfigError, match=r"spearman needs a bundle that embeds texts, but .* is for text-generation"):
        run(tiny_bundle, file, metric="spearman")


# ---------------------------------------------------------------------------------------------------------------------
# what stands beside a figure


def test_where_a_figure_came_from(tiny_bundle: Path, text: Path) -> None:
    found = run(tiny_bundle, text, metric="perplexity", tokens=100)
    assert found["data"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (
        found["bundle"]["manifest_sha256"] == hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    )
    assert found["settings"] == {"stride": 0, "tokens": 100, "window": 512, "threads": 1, "seed": 0}
    assert found["bootstrap"] == {"level": 0.95, "resamples": 1000, "seed": 0}
    assert {"edgepipe", "python", "numpy", "onnxruntime", "tokenizers"} == set(found["versions"])
    json.dumps(found, allow_nan=False)


def test_the_same_twice(tiny_bundle: Path, text: Path) -> None:
    first, second = (run(tiny_bundle, text, metric="perplexity", tokens=300) for _ in range(2))
    del first["seconds"], second["seconds"]
    assert first == second


def test_it_says_how_far_it_is_over_both_bundles(tiny_bundle: Path, text: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    options = Evaluation(metric="perplexity", tokens=300)
    evaluate_bundle(tiny_bundle, str(text), options, progress=lambda *what: heard.append(what), against=tiny_bundle)
    assert heard == [("perplexity", number, 6) for number in range(6)]
