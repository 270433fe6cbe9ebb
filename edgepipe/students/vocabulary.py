"""Cut a tokenizer.json down to some of its tokens, so that any text whose tokens are all kept has the same tokens.

Why that holds, kind by kind; K ⊂ V are the kept tokens:

    BPE        A token's merges are the same wherever it appears: merges across its ends never happened. With every
               token that its merges pass through in K, and all merges of V between tokens of K, in V's order, the
               next merge of a word is V's at every step.
    WordPiece  The longest match in V is in K, so it is the longest in K. A word that V can't cut is unknown; the pieces
               that were matched before that stay too, or K might find another way and cut it.
    Unigram    The best path in V is in K, and K has no other paths than V. The price of an unknown character is the
               lowest score minus 10, so a token of the lowest score stays.
    WordLevel  Every word is for itself.

Sources: tokenizers 0.23, models/{bpe,wordpiece,unigram}; Sennrich et al., arXiv:1508.07909; Kudo, arXiv:1804.10959.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Needs = Callable[[str], Collection[str]]  # token → the tokens that must stay for it to come out, itself among them


def read_kind(data: Json) -> str:
    """Return the kind of a tokenizer.json; ConfigError for one that can't be trimmed."""
    model: Json = data.get("model") or {}
    kind = model.get("type")
    if kind not in KINDS:
        raise ConfigError(f"a tokenizer of kind {kind!r} can't be trimmed: expected one of {', '.join(KINDS)}")
    if model.get("dropout"):
        raise ConfigError("a tokenizer with dropout can't be trimmed, because it cuts one text in many ways")
    return str(kind)


def model_tokens(data: Json) -> dict[str, int]:
    """Return the tokens of a tokenizer's model with their ids, added ones outside it left out."""
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score], the id is the place
        return {token: i for i, (token, _) in enumerate(vocab)}
    return dict(vocab)


def all_tokens(data: Json) -> dict[str, int]:
    """Return every token with its id; of one in the model and added too, the model's counts."""
    return {token["content"]: int(token["id"]) for token in _added(data)} | model_tokens(data)


def _added(data: Json) -> list[Json]:
    return data.get("added_tokens") or []


def needs_of(data: Json) -> Needs:
    """Return the function that says which tokens must stay with a token."""
    return _merged_from(data["model"]) if read_kind(data) == "BPE" else lambda token: (token,)


def permanent_tokens(data: Json, *, characters: bool) -> set[str]:
    """Return the tokens that stay whatever the texts are: single bytes, unknown, added, what frames a text.

    `characters`: also the single characters of a tokenizer that has no bytes to write unseen ones with.
    """
    model, tokens = data["model"], model_tokens(data)
    kept = {token["content"] for token in _added(data)}
    kept |= {token for token in _unknown(model) if token in tokens}
    kept |= {token for token in _framing(data.get("post_processor")) if token in tokens}
    if data["model"]["type"] == "Unigram" and tokens:
        kept.add(min(model["vocab"], key=lambda entry: float(entry[1]))[0])
    if model.get("byte_fallback"):
        kept |= {token for token in tokens if _BYTE.fullmatch(token)}
    elif characters or _has_bytes(data):
        kept |= {token for token in tokens if _is_character(model, token)}
    return kept


def _unknown(model: Json) -> Iterator[str]:
    """Yield the token of what a tokenizer doesn't know, if it has one."""
    if isinstance(model.get("unk_token"), str):
        yield model["unk_token"]
    if isinstance(model.get("unk_id"), int):
        yield model["vocab"][model["unk_id"]][0]


def _framing(part: Any) -> Iterator[str]:
    """Yield the tokens that a post-processor puts around a text."""
    if isinstance(part, list):
        for one in part:
            yield from _framing(one)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("sep", "cls") and _is_named(value):  # BertProcessing, RobertaProcessing
                yield value[0]
            elif key == "tokens" and isinstance(value, list):
                yield from value
            else:
                yield from _framing(value)


def _is_named(value: Any) -> bool:
    """Tell a post-processor's [token, id]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _has_bytes(data: Json) -> bool:
    """Say whether text reaches the model as bytes, each written as a character."""
    return '"ByteLevel"' in json.dumps([data.get("pre_tokenizer"), data.get("normalizer")])


def _is_character(model: Json, token: str) -> bool:
    if model["type"] == "BPE":
        return len(_symbols(model, token)) == 1
    prefix = model.get("continuing_subword_prefix") or ""
    return len(token) == 1 or (bool(prefix) and token.startswith(prefix) and len(token) == len(prefix) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# BPE


def _merged_from(model: Json) -> Needs:
    """Return the function that runs BPE over a token alone and says what it passes through."""
    vocab = model["vocab"]
    prefix = len(model.get("continuing_subword_prefix") or "")
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}

    def passed(token: str) -> set[str]:
        parts = _symbols(model, token)
        seen = {token, *parts}
        while len(parts) > 1:
            pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1][prefix:]]
            seen.add(parts[i])
        # Some tokens are no product of merges: words found whole (ignore_merges), added tokens, bytes
        return seen if parts == [token] and seen <= vocab.keys() else {token}

    return passed


def merge_pairs(model: Json) -> list[tuple[str, str]]:
    """Return the merges in order; files write them as "a b" or as ["a", "b"]."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _symbols(model: Json, token: str) -> list[str]:
    """Return the characters that BPE starts from, with the marks of a word's inside or end."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside, last = bool(prefix) and token.startswith(prefix), bool(suffix) and token.endswith(suffix)
    stem = token[len(prefix) if inside else 0 : len(token) - len(suffix) if last else None]
    if not stem:
        return [token]
    parts = [char if i == 0 and not inside else prefix + char for i, char in enumerate(stem)]
    parts[-1] += suffix if last else ""
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# WordPiece


def pieces_before_unknown(model: Json, word: str) -> list[str]:
    """Return the pieces WordPiece matches before it finds that it can't cut a word; none for a word it can."""
    vocab, prefix = model["vocab"], model["continuing_subword_prefix"]
    if len(word) > model["max_input_chars_per_word"]:
        return []
    pieces: list[str] = []
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = (prefix if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            return pieces
        pieces.append(piece)
        start = end
    return []


# ---------------------------------------------------------------------------------------------------------------------
# choosing and writing


def choose_tokens(counts: Mapping[str, int], must: Iterable[str], needs: Needs, size: int | None) -> set[str]:
    """Return the tokens to keep: `must`, and those that occur, the most frequent ones first until `size` are kept.

    A token goes in with all it needs, or not at all. Raises ConfigError when `must` alone is more than `size`.
    """
    kept = {part for token in must for part in needs(token)}
    if size is not None and len(kept) > size:
        raise ConfigError(
            f"trim.size: {size} tokens were asked for, but {len(kept)} must stay (bytes or characters, special tokens "
            "and the chat template's): ask for more"
        )
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        added = set(needs(token)) - kept
        if size is None or len(kept) + len(added) <= size:
            kept |= added
    return kept


def write_tokenizer(data: Json, kept: set[str]) -> tuple[Json, list[str]]:
    """Return a tokenizer.json with the kept tokens alone, and these by their new ids.

    The order stays; tokens outside the model follow those in it, because tokenizers numbers them so when it loads.
    """
    model = dict(data["model"])
    inside = model_tokens(data)
    order = sorted(kept & inside.keys(), key=inside.__getitem__)
    added = sorted((token for token in _added(data) if token["content"] in kept), key=lambda token: token["id"])
    order += [token["content"] for token in added if token["content"] not in inside]
    ids = {token: i for i, token in enumerate(order)}
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if entry[0] in ids and inside[entry[0]] == i]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = ids[next(_unknown(data["model"]))]
    else:
        model["vocab"] = {token: ids[token] for token in order if token in inside}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = merge_pairs(model)
        model["merges"] = [[a, b] for a, b in pairs if {a, b, a + b[prefix:]} <= model["vocab"].keys()]
    return {
        **data,
        "model": model,
        "added_tokens": [{**token, "id": ids[token["content"]]} for token in added],
        "post_processor": _renumbered(data.get("post_processor"), ids),
    }, order


def _renumbered(part: Any, ids: Mapping[str, int]) -> Any:
    """Return a post-processor with the new ids of the tokens it names."""
    if isinstance(part, list):
        return [_renumbered(one, ids) for one in part]
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("ids"), list) and isinstance(part.get("tokens"), list):
        return {**part, "ids": [ids[token] for token in part["tokens"]]}
    return {
        key: [value[0], ids[value[0]]] if key in ("sep", "cls") and _is_named(value) else _renumbered(value, ids)
        for key, value in part.items()
    }
