"""Tokenizers: what the runtime encodes with tokenizers alone equals transformers, over a thousand strings."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from edgepipe.errors import ConfigError
from edgepipe.sources.tokenizer import TokenizerParts, default_template, read_directory_tokenizer, read_gguf_tokenizer

from .conftest import make_decoder

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789٠١٢٣४५६",
    "     \t\n\r  　\x0b",
    ".,;:!?()[]{}<>|/\\'\"`~@#$%^&*-_=+",
    "中文字符日本語かなカナ한국어",
    "العربية مرحبا",
    "हिन्दी नमस्ते क्ष",
    "éàüßñçøå" + "e\u0301a\u0308n\u0303q\u0323\u0307",
    "\x00\x01\x07\x1b\x7f\x85\u200b\u200d\u202e\ufeff\ufffd",
    "😀🎉👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪",
    "𝔘𝔫𝔦𐍈𒀀\U0010ffff",
)
PHRASES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<unk>",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[PAD]",
    "<0x0A>",
    "▁",
    "Ġ",
    "##ing",
    "I'm you'll THEY'RE",
    "3.14159e-10 1,000,000 0x1F",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '<div class="a">&nbsp;</div>',
    '{"key": [1, 2, null]}',
    "user@example.org https://example.org/?q=1&r=2",
    "The quick brown fox",
)


def thousand_strings() -> list[str]:
    """Generate the test strings: seeded mixes of alphabets, phrases and whitespace runs, and the empty string."""
    rng = random.Random(0)
    strings = ["", " ", "\n", "  leading", "trailing  ", "a" * 500, *PHRASES]
    while len(strings) < 1000:
        pieces = []
        for _ in range(rng.randint(1, 8)):
            if rng.random() < 0.3:
                pieces.append(rng.choice(PHRASES))
            else:
                alphabet = rng.choice(ALPHABETS)
                pieces.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12))))
        strings.append(rng.choice(("", " ", "  ")).join(pieces))
    return strings


STRINGS = thousand_strings()


def assert_same_ids(parts: TokenizerParts, theirs: Any, tmp_path: Path) -> None:
    """Compare ids as the runtime makes them, from the file, with transformers'."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(parts.files["tokenizer.json"])
    ours = Tokenizer.from_file(str(path))
    longest = 0
    for text in STRINGS:
        ids = ours.encode(text, add_special_tokens=True).ids
        assert ids == theirs(text).input_ids, repr(text)
        longest = max(longest, len(ids))
    assert longest > 50


def test_strings_cover_what_they_should() -> None:
    """There are a thousand strings, every phrase and alphabet is in them, and they are not all short."""
    assert len(STRINGS) == 1000
    text = "".join(STRINGS)
    assert all(phrase in text for phrase in PHRASES)
    assert all(set(alphabet) <= set(text) for alphabet in ALPHABETS)


@pytest.mark.slow
def test_smollm2_ids_equal_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    """(a) The packaged GGUF's tokenizer encodes as AutoTokenizer on the same file."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    parts = read_gguf_tokenizer(smollm2_gguf, None)
    assert_same_ids(parts, theirs, tmp_path)
    assert (parts.eos_token_ids, parts.bos_token_id) == ({theirs.eos_token_id}, theirs.bos_token_id)


def test_minilm_ids_equal_transformers(minilm_directory: Path, tmp_path: Path) -> None:
    """(b) The encoder's ids are transformers', though its tokenizer.json pads and cuts to 128."""
    raw = json.loads((minilm_directory / "tokenizer.json").read_text())
    assert raw["truncation"] is not None
    assert raw["padding"] is not None
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_directory)
    assert_same_ids(read_directory_tokenizer(minilm_directory), theirs, tmp_path)


@pytest.mark.parametrize("kind", ["llama2_tokenizer", "qwen2_tokenizer"])
def test_made_tokenizers_equal_transformers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """(c) and (d) A byte-fallback BPE with <s>, and a byte-level BPE with chat tokens."""
    directory: Path = request.getfixturevalue(kind)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    parts = read_directory_tokenizer(directory)
    assert_same_ids(parts, theirs, tmp_path)
    if kind == "llama2_tokenizer":
        assert theirs("hello").input_ids[0] == theirs.bos_token_id == parts.bos_token_id == 1


def test_made_gguf_equals_transformers(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """A small GGUF's tokenizer encodes as AutoTokenizer on the same file, whatever else lies beside it."""
    path = write_gguf(make_decoder("qwen2", tied=True), "qwen2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert_same_ids(read_gguf_tokenizer(path, None), theirs, tmp_path)
    before = read_gguf_tokenizer(path, None)
    (path.parent / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "a"}')
    assert read_gguf_tokenizer(path, None) == before


def test_vocab_and_merges_without_tokenizer_json(qwen2_tokenizer: Path, tmp_path: Path) -> None:
    """A directory with vocab.json and merges.txt only is converted, with transformers' ids."""
    source = tmp_path / "gpt2"
    source.mkdir()
    model = json.loads((qwen2_tokenizer / "tokenizer.json").read_text())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (source / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    parts = read_directory_tokenizer(source)
    assert_same_ids(parts, theirs, tmp_path)
    assert parts.eos_token_ids == {vocab["<|endoftext|>"]}


def test_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    """A directory with a sentencepiece tokenizer.model only is converted, with transformers' ids."""
    import sentencepiece

    from .conftest import CORPUS

    source = tmp_path / "spm"
    source.mkdir()
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(source / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    assert_same_ids(read_directory_tokenizer(source), theirs, tmp_path)


def test_files_do_not_tell_where_they_came_from(qwen2_tokenizer: Path, tmp_path: Path) -> None:
    """The same tokenizer in two places gives the same bytes."""
    copy = shutil.copytree(qwen2_tokenizer, tmp_path / "elsewhere")
    assert read_directory_tokenizer(copy) == read_directory_tokenizer(qwen2_tokenizer)


def test_turn_end_of_the_template_ends_a_text(qwen2_tokenizer: Path, tmp_path: Path) -> None:
    """A turn end that the template names is an end of text, one that it doesn't name is not."""
    directory = shutil.copytree(qwen2_tokenizer, tmp_path / "chat")
    plain = read_directory_tokenizer(directory)
    (directory / "chat_template.jinja").write_text("<|im_start|>{{ messages }}<|im_end|><|eot_id|>")
    chat = read_directory_tokenizer(directory)
    tokenizer = Tokenizer.from_str(chat.files["tokenizer.json"].decode())
    assert plain.eos_token_ids == {tokenizer.token_to_id("<|endoftext|>")}
    assert chat.eos_token_ids == {tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")}


def test_default_template() -> None:
    """A string is itself, a list gives its default, anything else gives none."""
    assert default_template("text") == "text"
    assert default_template([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]) == "d"
    assert default_template([{"name": "rag", "template": "r"}]) is None
    assert default_template({"name": "default"}) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x", "y"]]}}', b"\xff" * 64],
)
def test_corrupted_tokenizer_json(qwen2_tokenizer: Path, tmp_path: Path, content: bytes) -> None:
    """A tokenizer.json that is no tokenizer is one sentence."""
    directory = shutil.copytree(qwen2_tokenizer, tmp_path / "bad")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"the tokenizer of .* cannot be read") as caught:
        read_directory_tokenizer(directory)
    assert "\n" not in str(caught.value)
