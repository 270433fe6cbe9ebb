"""Tokenizer: ids as transformers gives them; pieces that join to the whole; stop strings never leak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgepipe.errors import ConfigError
from edgepipe.runtime.tokenizer import StopFilter, Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  two  spaces\n\n\tand a tab ",
    "日本語のテキスト, naïve café, Привет",
    "👩‍👩‍👧 family 🏳️‍🌈 flag e\u0301",
    "code: for (i = 0; i < 10; ++i) { x[i] = '\\n'; }",
    "<s>not a special</s> and <|end|> is",
    "�",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def _byte_level() -> tokenizers.Tokenizer:
    """Train a GPT-2 style tokenizer: bytes as letters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _byte_fallback() -> tokenizers.Tokenizer:
    """Train a Llama-2 style tokenizer: ▁ for spaces, unknown characters as byte tokens, BOS in front."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.train_from_iterator(
        ["▁The▁capital▁of▁France▁is▁Paris.▁and▁two▁spaces▁code"],
        trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False),
    )
    learned = trained.get_vocab()
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in sorted(learned, key=learned.__getitem__) if name not in names]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


KINDS = {"byte level": _byte_level, "byte fallback": _byte_fallback}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """Save a tokenizer that would cut and pad, and open it."""
    made = KINDS[request.param]()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(path), path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(pair: tuple[Tokenizer, Path], text: str) -> None:
    """Encode as transformers does, special tokens added, nothing cut or padded; decode back."""
    ours, path = pair
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert ours.encode(text) == theirs(text).input_ids
    bare = ours.encode(text, add_special_tokens=False)
    assert bare == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(bare) == theirs.decode(bare, skip_special_tokens=True)
    if "<s>" not in text:  # beside special tokens the byte-fallback kind adds spaces, in both libraries
        assert ours.decode(bare) == text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole(pair: tuple[Tokenizer, Path], text: str) -> None:
    """Decode token by token: same text, and never half a character on the way."""
    ours, _ = pair
    ids = ours.encode(text)
    detokenizer = ours.detokenizer()
    pieces = [detokenizer.push(token) for token in ids]
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == ours.decode(ids)


@pytest.mark.parametrize("seed", range(100))
def test_pieces_join_to_the_whole_for_any_text(seed: int) -> None:
    """Hold for any text that UTF-8 can carry: characters of one to four bytes."""
    ours = _HELD["byte level"]
    random = np.random.default_rng(seed)
    tops = random.choice([0x80, 0x800, 0xD800, 0x110000], 30)
    text = "".join(chr(point) for point in random.integers(0, tops) if not 0xD800 <= point < 0xE000)
    ids = ours.encode(text)
    detokenizer = ours.detokenizer()
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == ours.decode(ids)


@pytest.mark.parametrize("seed", range(100))
def test_pieces_join_to_the_whole_for_any_tokens(seed: int) -> None:
    """Hold for byte-level tokens in any order, as a random model would write them: broken characters, specials."""
    ours = _HELD["byte level"]
    ids = np.random.default_rng(seed).integers(0, ours.vocab_size, 40).tolist()
    detokenizer = ours.detokenizer()
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == ours.decode(ids)


def test_space_after_a_special_token_stays() -> None:
    """Keep the space of a word that follows special tokens inside the stream."""
    ours = _HELD["byte fallback"]
    ids = [*ours.encode("is", add_special_tokens=False), 2, 2, *ours.encode("Paris", add_special_tokens=False)]
    detokenizer = ours.detokenizer()
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == ours.decode(ids) == "is Paris"


def test_unfinished_character_is_flushed() -> None:
    """Show at the end that bytes of a character were missing."""
    ours = _HELD["byte level"]
    detokenizer = ours.detokenizer()
    assert [detokenizer.push(token) for token in ours.encode("a語")[:2]] == ["a", ""]
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """Name the file."""
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(path)


def test_text_that_utf8_cannot_carry_is_refused() -> None:
    """Refuse lone surrogates with a sentence."""
    with pytest.raises(ConfigError, match="cannot be turned into tokens"):
        _HELD["byte level"].encode("a\ud800b")


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "stopped"),
    [
        (["END"], ["a", "b E", "N", "D c"], ["a", "b ", "", ""], True),
        (["END"], ["x E", "N", "E", "ND"], ["x ", "", "EN", ""], True),
        (["aab"], ["aa", "a", "b"], ["", "a", ""], True),
        (["\n\n", "."], ["one\n", "\ntwo"], ["one", ""], True),
        (["zz"], ["abc", "z"], ["abc", ""], False),
        ([], ["abc", "z"], ["abc", "z"], False),
    ],
)
def test_stop_strings_are_cut_and_never_leak(
    stop: list[str], pieces: list[str], shown: list[str], stopped: bool
) -> None:
    """Hold back what may become a stop string, cut before it, let go what did not become one."""
    held = StopFilter(stop)
    assert [held.push(piece) for piece in pieces] == shown
    assert held.stopped == stopped
    rest = held.flush()
    if not stopped:
        assert "".join(shown) + rest == "".join(pieces)
    else:
        assert rest == ""


@pytest.mark.parametrize("seed", range(100))
def test_stop_filter_equals_one_cut_of_the_whole(seed: int) -> None:
    """Show exactly the text before the first stop string, however the text is cut into pieces."""
    random = np.random.default_rng(seed)
    pieces = ["".join(random.choice(["a", "b"], size)) for size in random.integers(0, 4, 12)]
    stop = "".join(random.choice(["a", "b"], random.integers(1, 6)))
    held = StopFilter([stop])
    shown = "".join(held.push(piece) for piece in pieces)
    assert shown + held.flush() == "".join(pieces).split(stop)[0]


def _open(kind: str, folder: Path) -> Tokenizer:
    path = folder / f"{kind}.json"
    KINDS[kind]().save(str(path))
    return Tokenizer(path)


_HELD: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def _hold(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Open one tokenizer of each kind for the tests whose arguments are generated."""
    folder = tmp_path_factory.mktemp("held")
    _HELD.update({kind: _open(kind, folder) for kind in KINDS})
