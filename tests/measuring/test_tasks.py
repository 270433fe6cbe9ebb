"""Running a bundle over examples: labels chosen as the harness does, answers as the runtime gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import ConfigError, StageError
from edgepipe.measuring.examples import Asked, Labelled, Pair
from edgepipe.measuring.tasks import answers, chosen_rows, classified_rows, similarity_rows
from edgepipe.runtime import Model, load

WORDS = {"0": "river", "1": "timber was carried down", "2": "6.78"}
TEXTS = ["Every spring", "The mill turned it into", "Numbers such as 12,", "王伟 and Björn", "so do names"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """Load the bundle once."""
    return load(tiny_bundle, threads=1)


class Fixed:
    """Stand for an encoder: what a text gives is in a table."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table, self.batches = table, list[int]()

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of the table."""
        self.batches.append(len(texts))
        return np.array([self.table[text] for text in texts], np.float32)

    classify = embed


def quiet(done: int, total: int) -> None:
    """Hear nothing."""


def labelled(*labels: str) -> list[Labelled]:
    """Make an example of every text."""
    return [Labelled(text, label, f"f, line {i}") for i, (text, label) in enumerate(zip(TEXTS, labels, strict=True))]


def likeliest(model: Model, context: str, words: dict[str, str], joint: str = " ") -> str:
    """Choose the label whose tokens after the context have the largest summed log-probability, from whole logits."""
    totals = {}
    for label, word in words.items():
        ids = model.encode(context + joint + word)
        logits = model.logits(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        start = len(model.encode(context))
        assert ids[:start] == model.encode(context)
        totals[label] = sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids)))
    return max(totals, key=totals.__getitem__)


@pytest.mark.parametrize("words", [WORDS, {"a": ",", "b": "."}], ids=["several tokens", "single tokens"])
@pytest.mark.parametrize("prompt", ["{text}", "Say: {text}\n"], ids=["a space joins", "the prompt's own line end"])
def test_the_label_is_the_likeliest(model: Model, words: dict[str, str], prompt: str) -> None:
    joint = "\n" if prompt.endswith("\n") else " "
    expected = [likeliest(model, prompt.replace("{text}", text).rstrip(), words, joint) for text in TEXTS]
    rows = chosen_rows(model, labelled(*expected), words, prompt, False, quiet)
    assert rows.tolist() == [[1, 0]] * len(TEXTS)
    others = [next(label for label in words if label != right) for right in expected]
    assert chosen_rows(model, labelled(*others), words, prompt, False, quiet)[:, 0].sum() == 0


def test_a_single_token_needs_one_run_and_says_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of summing agree."""
    from edgepipe.measuring.tasks import _summed_logprobs

    ids = model.encode("The river carried the timber")
    context, candidates = ids[:-1], [[ids[-1]], [5], [300]]
    single = _summed_logprobs(model, context, candidates)
    slow = _summed_logprobs(model, context, [*candidates, [7, 8]])
    np.testing.assert_allclose(single, slow[:3], rtol=1e-4)


def test_the_chat_template_puts_the_label_where_the_answer_begins(model: Model) -> None:
    rows = chosen_rows(model, labelled(*"00000"), WORDS, "{text}?", True, quiet)
    for text, row in zip(TEXTS, rows, strict=True):
        shown = model.apply_chat_template([{"role": "user", "content": f"{text}?"}])
        assert row[0] == (likeliest(model, shown, WORDS, "") == "0")


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(model: Model) -> None:
    long = [Labelled("mill " * 200, "0", "f, line 1"), Labelled("mill", "0", "f, line 2")]
    assert chosen_rows(model, long, WORDS, "{text}", False, quiet)[:, 1].tolist() == [1, 0]


def test_labels_that_are_not_named_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"f, line 2: expected one of the labels 0, 1, 2, got 'x'"):
        chosen_rows(model, labelled("0", "1", "x", "0", "0"), WORDS, "{text}", False, quiet)
    with pytest.raises(ConfigError, match=r"f, line 0: the prompt and its longest label do not fit"):
        chosen_rows(model, labelled(*"00000"), {"0": "mill " * 200}, "{text}", False, quiet)


def test_pairs_are_compared_in_batches() -> None:
    encoder = Fixed({"a": [1, 0], "b": [0, 2], "c": [3, 3]})
    pairs = [Pair("a", "b", 0.0, "1"), Pair("a", "a", 5.0, "2"), Pair("a", "c", 2.5, "3")]
    rows = similarity_rows(encoder, pairs, 2, quiet)
    np.testing.assert_allclose(rows, [[0, 0], [1, 5], [0.5**0.5, 2.5]], atol=1e-7)
    assert encoder.batches == [4, 2]


def test_classes_are_the_largest_logits() -> None:
    classifier = Fixed({text: [0, i == 1, i == 2] for i, text in enumerate(TEXTS)})
    assert classified_rows(classifier, labelled(*"01210"), {}, 2, quiet)[:, 0].tolist() == [1, 1, 1, 0, 1]
    names = {"World": "0", "Sports": "1", "Business": "2"}
    examples = labelled("World", "Sports", "Business", "Sports", "World")
    assert classified_rows(classifier, examples, names, 8, quiet)[:, 0].tolist() == [1, 1, 1, 0, 1]
    for wrong, labels in (("3", {}), ("-1", {}), ("x", {}), ("Sci/Tech", names), ("0", {"0": "3"})):
        with pytest.raises(ConfigError, match=r"f, line 0: expected .* as the label, got"):
            classified_rows(classifier, labelled(wrong, *"0000"), labels, 2, quiet)


def test_what_is_no_number_is_refused() -> None:
    broken = Fixed({text: [float("nan")] for text in TEXTS})
    with pytest.raises(StageError, match=r"f, line 0 or one of the 1 after it: the logits are no finite numbers"):
        classified_rows(broken, labelled(*"00000"), {}, 2, quiet)
    with pytest.raises(StageError, match=r"x: the embeddings are no finite numbers"):
        similarity_rows(broken, [Pair(TEXTS[0], TEXTS[1], 1.0, "x")], 2, quiet)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_the_runtime_s(model: Model, batch: int, chat: bool) -> None:
    asked = [Asked(text, ("x",), f"f, line {i}") for i, text in enumerate(TEXTS)]
    heard: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_new_tokens": 6, "stop": ("e",)}
    found = answers(
        model,
        asked,
        prompt="Q: {text}",
        chat=chat,
        batch=batch,
        tick=lambda done, total: heard.append((done, total)),
        **options,
    )
    prompts: list[Any] = [f"Q: {text}" for text in TEXTS]
    prompts = [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts
    assert found == [model.generate(prompt, **options).text.strip() for prompt in prompts]
    assert heard == [(start, 5) for start in range(0, 5, batch)]


def test_an_input_that_is_too_long_is_named(model: Model) -> None:
    asked = [Asked("a", ("x",), "f, line 1"), Asked("mill " * 200, ("x",), "f, line 2")]
    options: dict[str, Any] = {"prompt": "{text}", "chat": False, "max_new_tokens": 2, "stop": (), "tick": quiet}
    with pytest.raises(ConfigError, match=r"f, line 1 or one of the 1 after it: the prompt has"):
        answers(model, asked, batch=2, **options)
    with pytest.raises(ConfigError, match=r"^f, line 2: the prompt has"):
        answers(model, asked, batch=1, **options)
