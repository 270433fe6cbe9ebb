"""Vocabularies: text whose tokens are all kept has the same tokens, in every kind of tokenizer; what stays, and why."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.students.trimming import trim
from edgepipe.students.vocabulary import (
    all_tokens,
    merge_pairs,
    needs_of,
    permanent_tokens,
    pieces_before_unknown,
    read_kind,
)
from tests.vocabularies import CORPUS, STRANGE, TOKENIZERS, WORDS, cut, model_of, tokenizer_of

KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(STRANGE, max_size=3)), max_size=6).map("".join),
    st.text(STRANGE, max_size=20),
    st.text(max_size=10),
).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


@cache
def original(kind: str) -> TorchModel:
    """Return the model of a tokenizer, made once."""
    return model_of(TOKENIZERS[kind]())


@KINDS
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4).filter(lambda texts: any(text.strip() for text in texts)),
    others=st.lists(TEXTS, max_size=6),
    size=st.one_of(st.none(), st.integers(300, 420)),
    characters=st.booleans(),
)
def test_text_of_kept_tokens_has_the_same_tokens(
    kind: str, texts: list[str], others: list[str], size: int | None, characters: bool
) -> None:
    """Other text than that of the data too, as long as its tokens are kept; the data's always are without a size."""
    model = original(kind)
    smaller, kept = trim(model, texts, size, characters=characters)
    old, new = tokenizer_of(model), tokenizer_of(smaller)
    known = set(new.get_vocab())
    assert known <= set(old.get_vocab())
    assert size is None or new.get_vocab_size() <= size
    before, after = cut(old, texts), cut(new, texts)
    if size is None:
        assert after == before
        assert kept.coverage == 1
    assert all(ours == row for row, ours in zip(before, after, strict=True) if set(row) <= known)
    may_find_a_way = {"[UNK]"} if kind == "WordPiece" and not characters else set()  # an unknown word of other text
    for row, ours in zip(cut(old, others), cut(new, others), strict=True):
        assert ours == row or not set(row) <= known or may_find_a_way & set(row)


@KINDS
def test_new_ids_are_those_of_the_old_order(kind: str) -> None:
    model = original(kind)
    smaller, kept = trim(model, CORPUS[:1])
    old, new = tokenizer_of(model), tokenizer_of(smaller)
    ids = [new.token_to_id(old.id_to_token(int(i))) for i in kept.old_ids]
    assert ids == list(range(new.get_vocab_size()))
    assert len(ids) < old.get_vocab_size()
    assert kept.old_ids.tolist() == sorted(kept.old_ids.tolist())


@KINDS
def test_unseen_text_has_tokens(kind: str) -> None:
    """Whatever is trimmed, text that had no unknown token has none: bytes or characters stay."""
    model = original(kind)
    smaller, _ = trim(model, ["The"])
    for text in ("recorders", "re-recorded", "王", "🙂", "Björn", "6.78"):
        before, after = cut(tokenizer_of(model), [text])[0], cut(tokenizer_of(smaller), [text])[0]
        unknown = {"[UNK]", "<unk>"}
        if not unknown & set(before) and kind != "WordLevel":
            assert after and not unknown & set(after), text


def test_bytes_and_added_tokens_stay() -> None:
    rules = json.loads(TOKENIZERS["byte-level BPE"]().to_str())
    kept = permanent_tokens(rules, characters=False)
    assert kept == {*pre_tokenizers.ByteLevel.alphabet(), "<|start|>", "<|end|>", "mill"}
    rules = json.loads(TOKENIZERS["BPE with byte tokens"]().to_str())
    assert permanent_tokens(rules, characters=False) == permanent_tokens(rules, characters=True)
    assert len(permanent_tokens(rules, characters=True)) == 256 + 3
    rules = json.loads(TOKENIZERS["WordPiece"]().to_str())
    assert permanent_tokens(rules, characters=False) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    assert {"a", "##a", "王"} < permanent_tokens(rules, characters=True)


def merging(merges: list[tuple[str, str]], characters: str = "abcd", **options: object) -> dict[str, object]:
    """Return the rules of a BPE tokenizer of these merges."""
    tokens = dict.fromkeys([*characters, *("".join(pair) for pair in merges)])
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options)
    rules: dict[str, object] = json.loads(Tokenizer(model).to_str())
    return rules


def test_what_bpe_merges_on_the_way_stays() -> None:
    needs = needs_of(merging([("a", "b"), ("c", "d"), ("b", "c"), ("ab", "cd"), ("abcd", "a")]))
    assert set(needs("abcda")) == {"a", "b", "c", "d", "ab", "cd", "abcd", "abcda"}
    assert set(needs("bc")) == {"b", "c", "bc"}
    # of several ways to one token, only the one that BPE takes
    needs = needs_of(merging([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]))
    assert set(needs("abc")) == {"a", "b", "c", "ab", "abc"}


def test_a_token_that_no_merges_lead_to_needs_nothing() -> None:
    rules = json.loads(TOKENIZERS["BPE with whole words"]().to_str())
    assert set(needs_of(rules)("Ġnowhere")) == {"Ġnowhere"}


def test_merges_are_read_as_files_write_them() -> None:
    assert merge_pairs({"merges": ["Ġ t", "a b"]}) == merge_pairs({"merges": [["Ġ", "t"], ["a", "b"]]})


def test_a_token_goes_in_whole_or_not_at_all() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(merging([("a", "b"), ("ab", "c"), ("abc", "d")])))
    model = model_of(tokenizer)
    for size, expected in ((4, ["a", "b", "c", "d"]), (5, ["ab"]), (6, ["ab"]), (7, ["ab", "abc", "abcd"])):
        smaller, kept = trim(model, ["abcd", "abcd", "ab"], size)
        assert set(tokenizer_of(smaller).get_vocab()) == {*"abcd", *expected}
        assert kept.tokens_before == 3
        assert kept.covered == 2 * ("abcd" in expected) + ("ab" in expected)


def test_an_unknown_word_stays_unknown() -> None:
    """WordPiece matches "ab" and finds no "##x": without "ab" it would find "a" and "##bx"."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "ab", "a", "##bx", "##y", "b", "x"])}
    model = models.WordPiece(vocab=vocab, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pieces_before_unknown(json.loads(tokenizer.to_str())["model"], "abx") == ["ab"]
    smaller, _ = trim(model_of(tokenizer), ["a abx", "aby"], characters=False)
    assert cut(tokenizer_of(smaller), ["abx", "aby"]) == [["[UNK]"], ["ab", "##y"]]
    with_bx = ["ay abx", "abx"]
    assert cut(tokenizer, with_bx) == cut(
        tokenizer_of(trim(model_of(tokenizer), with_bx, characters=False)[0]), with_bx
    )


def test_the_price_of_an_unknown_character_stays() -> None:
    """Unigram: it is the lowest score − 10, so the piece that has the lowest stays though nothing uses it."""
    vocab = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("rare", -30.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    smaller, _ = trim(model_of(tokenizer), ["aa"], characters=False)
    assert json.loads(tokenizer_of(smaller).to_str())["model"]["vocab"] == [
        ["<unk>", 0.0],
        ["a", -1.0],
        ["rare", -30.0],
    ]


def test_kinds_that_cannot_be_trimmed() -> None:
    with pytest.raises(ConfigError, match=r"^a tokenizer of kind 'Rhyme' can't be trimmed: expected one of BPE, U"):
        read_kind({"model": {"type": "Rhyme"}})
    with pytest.raises(ConfigError, match=r"^a tokenizer with dropout can't be trimmed"):
        read_kind(merging([("a", "b")], dropout=0.1))


def test_tokens_outside_the_model_are_counted() -> None:
    rules = json.loads(TOKENIZERS["byte-level BPE"]().to_str())
    assert all_tokens(rules)["<|end|>"] == len(rules["model"]["vocab"]) + 1
