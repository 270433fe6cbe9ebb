"""Run a loaded bundle over examples: embed, classify, choose a label, answer. What a bundle can't do is refused.

Choosing a label with a text model is `acc` of lm-evaluation-harness: the label whose tokens, after the prompt, have the
largest summed log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgepipe.errors import ConfigError, StageError
from edgepipe.measuring.examples import Asked, Labelled, Pair
from edgepipe.measuring.scores import cosine_similarity
from edgepipe.runtime.sampling import log_softmax
from edgepipe.runtime.text_generation import Model

TEXT = "{text}"  # where a prompt takes the example

Tick = Callable[[int, int], None]  # examples done, examples in all


@runtime_checkable
class Embedder(Protocol):
    """Say what a bundle offers that turns texts into vectors."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return [texts, dim] float32."""


@runtime_checkable
class Classifier(Protocol):
    """Say what a bundle offers that knows a fixed set of labels."""

    def classify(self, texts: list[str]) -> np.ndarray:
        """Return logits [texts, labels] float32."""


@runtime_checkable
class Generator(Protocol):
    """Say what a bundle offers that answers a text."""

    def generate(self, prompt: Any, *, max_new_tokens: int, stop: str | Sequence[str]) -> Any:
        """Return the answer, with its `text`; of a batch a list."""


def similarity_rows(model: Embedder, pairs: Sequence[Pair], batch: int, tick: Tick) -> np.ndarray:
    """Return [pairs, 2] float64: the cosine of the embeddings, and the score that people gave."""
    cosines = []
    for start in range(0, len(pairs), batch):
        tick(start, len(pairs))
        part = pairs[start : start + batch]
        vectors = model.embed([*(pair.first for pair in part), *(pair.second for pair in part)])
        if not np.isfinite(vectors).all():
            raise StageError(f"{_places(part)}: the embeddings are no finite numbers: build the bundle again")
        cosines.append(cosine_similarity(vectors[: len(part)], vectors[len(part) :]))
    return np.stack([np.concatenate(cosines), [pair.score for pair in pairs]], axis=1)


def classified_rows(
    model: Classifier, examples: Sequence[Labelled], labels: Mapping[str, str], batch: int, tick: Tick
) -> np.ndarray:
    """Return [examples, 1] float64: 1 where the largest logit is the label's, else 0.

    `labels` gives the number of the logit for each label as the file writes it; without, the file writes the number.
    """
    hits: list[np.ndarray] = []
    for start in range(0, len(examples), batch):
        tick(start, len(examples))
        part = examples[start : start + batch]
        logits = model.classify([one.text for one in part])
        if not np.isfinite(logits).all():
            raise StageError(f"{_places(part)}: the logits are no finite numbers: build the bundle again")
        wanted = [_logit_of(one, labels, logits.shape[1]) for one in part]
        hits.append(logits.argmax(axis=1) == np.array(wanted))
    return np.concatenate(hits).astype(np.float64)[:, None]


def chosen_rows(
    model: Model, examples: Sequence[Labelled], labels: Mapping[str, str], prompt: str, chat: bool, tick: Tick
) -> np.ndarray:
    """Return [examples, 2] float64: 1 where the label's words are the likeliest, and 1 where the prompt was cut."""
    names = list(labels)
    if unknown := next((one for one in examples if one.label not in labels), None):
        raise ConfigError(
            f"{unknown.place}: expected one of the labels {', '.join(names)}, got {unknown.label!r}: "
            "name every label of the file with --labels"
        )
    rows = np.zeros((len(examples), 2))
    for number, one in enumerate(examples):
        tick(number, len(examples))
        context, candidates = _candidates(model, prompt.replace(TEXT, one.text), list(labels.values()), chat)
        longest = max(map(len, candidates))
        if not context or longest >= model.context:
            raise ConfigError(f"{one.place}: the prompt and its longest label do not fit: shorten one of them")
        kept = context[-(model.context - longest) :]  # the end, as the harness does: the question stands there
        scores = _summed_logprobs(model, kept, candidates)
        if not np.isfinite(scores).any():
            raise StageError(f"{one.place}: the logits are no finite numbers: build the bundle again")
        rows[number] = names[int(np.nanargmax(scores))] == one.label, len(kept) < len(context)
    return rows


def answers(
    model: Generator,
    examples: Sequence[Asked],
    *,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    stop: tuple[str, ...],
    batch: int,
    tick: Tick,
) -> list[str]:
    """Return the greedy answer to each example, without white space at its ends."""
    found: list[str] = []
    for start in range(0, len(examples), batch):
        tick(start, len(examples))
        part = examples[start : start + batch]
        asked: list[Any] = [prompt.replace(TEXT, one.text) for one in part]
        if chat:
            asked = [[{"role": "user", "content": text}] for text in asked]
        try:
            if batch == 1:
                made = [model.generate(asked[0], max_new_tokens=max_new_tokens, stop=stop)]
            else:
                made = model.generate(asked, max_new_tokens=max_new_tokens, stop=stop)
        except ConfigError as error:  # one that is too long, say
            raise ConfigError(f"{_places(part)}: {error}") from error
        found += [one.text.strip() for one in made]
    return found


def _places(part: Sequence[Pair | Labelled | Asked]) -> str:
    """Return where a batch comes from."""
    return part[0].place + (f" or one of the {len(part) - 1} after it" if len(part) > 1 else "")


def _logit_of(example: Labelled, labels: Mapping[str, str], count: int) -> int:
    """Return the number of the logit that a label stands for."""
    number = labels.get(example.label, "" if labels else example.label).strip()
    if not number.isdecimal() or int(number) >= count:
        names = f"one of {', '.join(labels)}" if labels else f"a number below {count}"
        raise ConfigError(
            f"{example.place}: expected {names} as the label, got {example.label!r}: "
            f"give the {count} numbers of the labels with --labels"
        )
    return int(number)


def _candidates(model: Model, prompt: str, words: list[str], chat: bool) -> tuple[list[int], list[list[int]]]:
    """Return the ids of the prompt, and those of each label's words after it.

    Words are joined by the white space that ends the prompt, or by one space; they are encoded together with it, so
    that a space belongs to the word as in running text.
    """
    if chat:
        context = model.apply_chat_template([{"role": "user", "content": prompt}])
        joint, special = "", False  # the template writes the special tokens itself
    else:
        context = prompt.rstrip()
        joint, special = prompt[len(context) :] or " ", True
    ids = model.tokenizer.encode(context, add_special_tokens=special)
    whole = [model.tokenizer.encode(context + joint + word, add_special_tokens=special) for word in words]
    shared = 0
    most = min([len(ids), *(len(one) - 1 for one in whole)])  # at least one token must be left to score
    while shared < most and all(one[shared] == ids[shared] for one in whole):
        shared += 1
    return ids[:shared], [one[shared:] for one in whole]


def _summed_logprobs(model: Model, context: list[int], candidates: list[list[int]]) -> np.ndarray:
    """Return the summed log-probability [candidates] of each continuation after the context."""
    if all(len(one) == 1 for one in candidates):  # one run tells all of them
        last = log_softmax(model.logits(context, all_positions=False))[0]
        return np.asarray(last[[one[0] for one in candidates]])
    return np.array([model.token_logprobs([*context, *one])[-len(one) :].sum() for one in candidates])
