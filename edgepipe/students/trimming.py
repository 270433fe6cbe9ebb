"""Trim a model's vocabulary to the tokens that texts use: tokenizer, embedding, output head, ids in the config.

What stays is exact: a kept token's rows of embedding and head are copied as they are stored, off a grid too, and any
text whose tokens are all kept has the same tokens as before (vocabulary.py says why). So the model computes the same
numbers on it; only the logits of tokens that are gone are missing.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgepipe.artifacts import Json, ModelInfo, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, ContractError
from edgepipe.students.vocabulary import (
    all_tokens,
    choose_tokens,
    needs_of,
    permanent_tokens,
    pieces_before_unknown,
    read_kind,
    write_tokenizer,
)
from edgepipe.weights import Value, Weight, WeightStore

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_BATCH = 1000  # texts encoded at a time
# Tables that aren't a vocabulary's, though a tiny model may have as many rows in them
_OTHER_TABLES = re.compile(r"position|token_type|relative|wpe|segment")
_HEAD_BIAS = re.compile(r"^(?!.*(\.\d+\.|dense|norm|pooler|classifier)).*bias$", re.IGNORECASE)
_IDS = re.compile(r"_token_ids?$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$")  # keys of a config
_FIRST_IDS = 16  # a padding token among these keeps its id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptTokens:
    """Say which tokens stayed, and what that means for the texts."""

    old_ids: np.ndarray  # [tokens kept] int64: the id that each had, by its new one; cuts a teacher's logits
    rows_before: int  # of the embedding
    permanent: int  # of the tokens kept, those that stay whatever the texts are
    words: int  # of the texts, cut at white space
    tokens_before: int  # of the texts, with the old tokenizer
    tokens_after: int  # with the new one
    covered: int  # of tokens_before, those whose token was kept

    @property
    def coverage(self) -> float:
        """Return the share of the texts' tokens that were kept; 1 means that no text has other tokens than before."""
        return self.covered / self.tokens_before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Used:
    """Hold what texts use of a vocabulary."""

    counts: Mapping[int, int]  # id → how often it occurs
    words: int
    unknown: frozenset[str]  # pieces without which unknown words might become known


def check_trimmable(model: TorchModel) -> None:
    """Raise ConfigError for a model whose vocabulary can't be trimmed."""
    info = model.info
    if _FILE not in info.tokenizer:
        raise ConfigError(f"{info.name} reads no text, so it has no vocabulary to trim")
    read_kind(_rules(info))
    rows = _rows(info.config)
    if info.config.get("decoder_vocab_size") not in (None, rows):
        raise ConfigError(f"{info.name} has two vocabularies, of source and of target: one can be trimmed")
    if not _tables(model, rows):
        raise ConfigError(f"{info.name} has no embedding of the {rows} rows that its config.json promises")


def trim(
    model: TorchModel, texts: Iterable[str], size: int | None = None, *, characters: bool = True
) -> tuple[TorchModel, KeptTokens]:
    """Return the model with the tokens that `texts` use, or the most frequent `size` of its tokens, and what was kept.

    Single bytes (or byte tokens), special and other added tokens, the chat template's and the config's always stay;
    where text doesn't reach the tokenizer as bytes, single characters too unless `characters` is false. Weights are cut
    when they are read. Raises ConfigError when the model can't be trimmed, there is no text, or `size` is too small.
    """
    check_trimmable(model)
    info, rows = model.info, _rows(model.info.config)
    rules, config = _rules(info), _with_default_ids(info.config, rows)
    ids = {token: i for token, i in all_tokens(rules).items() if i < rows}
    names = {i: token for token, i in ids.items()}
    given = [text for text in texts if text]
    if not any(text.strip() for text in given):
        raise ConfigError("there is no text in the data: a vocabulary is trimmed to what texts use")
    old = Tokenizer.from_str(json.dumps(rules))
    used = _use(old, rules, given)
    if beyond := [i for i in used.counts if i not in names]:
        raise ConfigError(
            f"the texts use {old.id_to_token(beyond[0])!r}, whose id {beyond[0]} has no row in the embedding of {rows}"
        )
    must = (permanent_tokens(rules, characters=characters) & ids.keys()) | used.unknown
    must |= {names[i] for i in _special_ids(info, config, old) if i in names}
    needs = needs_of(rules)
    permanent = choose_tokens({}, must, needs, size)
    kept = choose_tokens({names[i]: n for i, n in used.counts.items()}, must, needs, size)
    changed_rules, order = write_tokenizer(rules, kept)
    bare = sorted(i for i in set(_ids_in_config(config)) if i < rows and i not in names)  # rows without a token
    old_ids = np.array([ids[token] for token in order] + bare, np.int64)
    new_ids = {int(i): place for place, i in enumerate(old_ids)}
    pad = _counted_from(config)
    if pad is not None and new_ids.get(pad) != pad:
        raise ConfigError(f"the padding token's id {pad} would change, but some families count positions from it")
    after = _compare(old, Tokenizer.from_str(json.dumps(changed_rules)), given, new_ids)
    smaller = TorchModel(
        info=_renumbered_info(info, config, changed_rules, new_ids),
        weights=_cut(model, rows, old_ids),
        history=model.history,
    )
    return smaller, KeptTokens(
        old_ids=old_ids,
        rows_before=rows,
        permanent=len(permanent),
        words=used.words,
        tokens_before=sum(used.counts.values()),
        tokens_after=after,
        covered=sum(n for i, n in used.counts.items() if i in new_ids),
    )


def _special_ids(info: ModelInfo, config: Json, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that a model's files name, or its chat template writes."""
    found = {*_ids_in_config(config), *info.eos_token_ids}
    found |= set() if info.bos_token_id is None else {info.bos_token_id}
    for ids in _encoded(tokenizer, _template_texts(info), frame=False):
        found.update(ids)
    return found | set(range(_counted_from(config) or 0))


def _counted_from(config: Json) -> int | None:
    """Return the padding token's id if it is one of the first: RoBERTa's kin count positions from it, so it stays."""
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < _FIRST_IDS else None


# ---------------------------------------------------------------------------------------------------------------------
# what is used


def _rules(info: ModelInfo) -> Json:
    rules: Json = json.loads(info.tokenizer[_FILE])
    return rules


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], frame: bool = True) -> list[list[int]]:
    """Return the ids of texts; `frame` adds the special tokens around each."""
    try:
        return [list(row.ids) for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=frame)]
    except Exception as error:  # the library raises bare Exception: lone surrogates, no unknown token
        raise ConfigError(f"the texts can't be turned into tokens: {error}") from error


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))


def _use(tokenizer: Tokenizer, rules: Json, texts: Sequence[str]) -> _Used:
    """Count tokens and words of texts."""
    counts: Counter[int] = Counter()
    unknown: set[str] = set()
    model = rules["model"]
    mark = tokenizer.token_to_id(model["unk_token"]) if model["type"] == "WordPiece" else None
    for batch in _batches(texts):
        for text, ids in zip(batch, _encoded(tokenizer, batch), strict=True):
            counts.update(ids)
            if mark is not None and mark in ids:
                unknown |= {piece for word in _words(tokenizer, text) for piece in pieces_before_unknown(model, word)}
    return _Used(counts=counts, words=sum(len(text.split()) for text in texts), unknown=frozenset(unknown))


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the words that a text reaches the tokenizer's model in."""
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] if tokenizer.pre_tokenizer else [text]


def _template_texts(info: ModelInfo) -> list[str]:
    """Return what the chat template itself writes: its texts, and conversations as it writes them."""
    if info.chat_template is None:
        return []
    import jinja2

    from edgepipe.runtime.chat import ChatTemplate

    source = info.chat_template
    texts = []
    with contextlib.suppress(jinja2.TemplateError):
        for _, kind, text in jinja2.Environment().lex(source):
            if kind == "data":
                texts.append(text)
            elif kind == "string":
                with contextlib.suppress(ValueError, SyntaxError):
                    texts.append(ast.literal_eval(text))
    turns = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant", "user")]
    # The date of today would make other tokens tomorrow
    dateless = source.replace("strftime_now(", "string(") if "strftime_now(" in source else source
    for messages in (turns, turns[1:], turns[1:2]):
        with contextlib.suppress(ConfigError):  # a template that refuses a system's turn, or doesn't compile
            texts.append(ChatTemplate(dateless, info.special_tokens).render(messages))
    return [text for text in texts if isinstance(text, str) and text]


def _compare(old: Tokenizer, new: Tokenizer, texts: Sequence[str], new_ids: Mapping[int, int]) -> int:
    """Hold the promise to every text: same tokens where all are kept. Return how many tokens there are now."""
    count = 0
    for batch in _batches(texts):
        for text, before, after in zip(batch, _encoded(old, batch), _encoded(new, batch), strict=True):
            count += len(after)
            if all(i in new_ids for i in before) and [new_ids[i] for i in before] != after:
                raise ContractError(f"the trimmed tokenizer cuts {text[:40]!r} otherwise, though its tokens were kept")
    return count


# ---------------------------------------------------------------------------------------------------------------------
# what changes


def _rows(config: Json) -> int:
    """Return how many tokens a config promises."""
    if "vocab_size" in config:
        return int(config["vocab_size"])
    from edgepipe.graph.reference import framework_config

    return int(getattr(framework_config(config), "vocab_size", 0))


def _with_default_ids(config: Json, rows: int) -> Json:
    """Return a config that names the ids which its class would else take from another vocabulary."""
    from edgepipe.graph.reference import framework_config
    from edgepipe.students.config import is_student

    if is_student(config):
        return config
    whole = framework_config(config).to_dict()
    ids = {key: value for key, value in whole.items() if _IDS.search(key) and key not in config}
    return {**config, **{key: value for key, value in ids.items() if isinstance(value, int) and value < rows}}


def _ids_in_config(config: Json) -> Iterator[int]:
    """Yield the token ids in a config, in the configs inside it too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _ids_in_config(value)
        elif _IDS.search(key):
            yield from _flat(value)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        yield value


def _renumbered(config: Json, new_ids: Mapping[int, int], rows: int) -> Json:
    """Return a config with new ids and size; an id that had no row stays, as wrong as it was."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(one) for one in value]
        return new_ids.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    changed: Json = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = _renumbered(value, new_ids, rows)
        elif key in ("vocab_size", "decoder_vocab_size") and value == rows:
            changed[key] = len(new_ids)
        else:
            changed[key] = change(value) if _IDS.search(key) else value
    return changed


def _renumbered_info(info: ModelInfo, config: Json, rules: Json, new_ids: Mapping[int, int]) -> ModelInfo:
    """Return what stays true of the model, with the new ids."""
    settings = json.loads(info.tokenizer.get(_SETTINGS, b"{}"))
    if isinstance(known := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(new_ids[int(i)]): token for i, token in known.items() if int(i) in new_ids
        }
    files = {_FILE: rules, _SETTINGS: settings}
    changed = _renumbered(config, new_ids, _rows(config))
    return dataclasses.replace(
        info,
        config={**changed, "vocab_size": len(new_ids)},
        tokenizer={
            **info.tokenizer,
            **{name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()},
        },
        eos_token_ids=tuple(sorted(new_ids[i] for i in info.eos_token_ids if i in new_ids)),
        bos_token_id=None if info.bos_token_id is None else new_ids.get(info.bos_token_id),
    )


def _tables(model: TorchModel, rows: int) -> set[str]:
    """Return the names of the weights with a row per token."""
    found = {model.weights[name].name for name in model.info.embeddings if name in model.weights}
    return {name for name in found if _is_table(model.weights[name], rows)}


def _is_table(weight: Weight, rows: int) -> bool:
    return len(weight.shape) == 2 and weight.shape[0] == rows and not _OTHER_TABLES.search(weight.name)


def _cut(model: TorchModel, rows: int, old_ids: np.ndarray) -> WeightStore:
    """Return the weights with the rows of the kept tokens, each read when it is asked for."""
    tables = _tables(model, rows)
    changed = {}
    for name, weight in model.weights.items():
        if name in tables:
            changed[name] = _of_rows(weight, old_ids, axis=0)
        elif weight.shape in ((rows,), (1, rows)) and _HEAD_BIAS.match(name):
            changed[name] = _of_rows(weight, old_ids, axis=len(weight.shape) - 1)
    return model.weights.replace(changed)


def _of_rows(weight: Weight, old_ids: np.ndarray, *, axis: int) -> Weight:
    shape = list(weight.shape)
    nbytes = weight.nbytes // shape[axis] * len(old_ids)  # rows of one weight are stored alike
    shape[axis] = len(old_ids)
    return dataclasses.replace(weight, shape=tuple(shape), nbytes=nbytes, load=partial(_take, weight, old_ids, axis))


def _take(weight: Weight, old_ids: np.ndarray, axis: int) -> Value:
    """Read the kept rows: bits move, nothing is rounded."""
    value = weight.load()
    if not isinstance(value, QuantizedTensor):
        return np.take(value, old_ids, axis=axis)
    parts = {part: getattr(value, part) for part in ("codes", "scale", "zero_points", "minima")}
    cut = {part: array[old_ids] for part, array in parts.items() if array is not None}
    return dataclasses.replace(value, shape=(len(old_ids), value.shape[1]), **cut)
