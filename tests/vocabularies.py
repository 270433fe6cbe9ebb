"""Small tokenizers of every kind that can be trimmed, and a model around each whose weights mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from edgepipe.artifacts import Json, Licence, ModelInfo, TorchModel
from edgepipe.weights import WeightStore
from tests.decoders import stored

CORPUS = [
    "The river carried the timber down to the mill, and the mill turned it into boards.",
    "Every spring the water rose, and every spring somebody said it had never risen so high before.",
    "Numbers such as 12, 345 and 6.78 appear; so do names, e.g. Anna, Björn and 王伟.",
    "\tunbelievably, the re-recorded recorders re-recorded it unbelievably often\n\n",
] * 4
WORDS = sorted({word for text in CORPUS for word in text.split()} | {"nowhere"})
STRANGE = "aAeéß漢王🙂 \t\n.,-12Ġ▁#<x"  # characters that the corpus has, and some that it hasn't
NO_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ORDINARY: dict[str, Any] = {"vocab_size": 420, "show_progress": False}


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, **_ORDINARY))
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("mill", single_word=True)])
    return tokenizer


def _whole_words() -> Tokenizer:
    """Find a word that is a token before merging, as Llama 3 does; one of them no merge leads to."""
    rules = json.loads(_byte_level().to_str())
    rules["model"]["ignore_merges"] = True
    end = len(rules["model"]["vocab"])
    rules["model"]["vocab"]["Ġnowhere"] = end
    for token in rules["added_tokens"]:
        token["id"] += token["id"] >= end
    return Tokenizer.from_str(json.dumps(rules))


def _marked_ends() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], end_of_word_suffix="</w>", **_ORDINARY)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _marked_insides() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], continuing_subword_prefix="##", **_ORDINARY)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """Make what Llama 2 has: no words, bytes where a character is missing, and every way to merge a token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", "<s>", "</s>", *_BYTES], show_progress=False, limit_alphabet=30
    )
    tokenizer.train_from_iterator([" ".join(CORPUS)], trainer)
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]
    vocab = rules["model"]["vocab"]
    splits = [(token[:i], token[i:]) for token in vocab if token not in _BYTES for i in range(1, len(token))]
    splits = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    rules["model"]["merges"] = sorted(splits, key=lambda pair: (vocab["".join(pair)], vocab[pair[0]]))
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], **_ORDINARY)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _unigram_bytes() -> Tokenizer:
    rules = json.loads(_unigram().to_str())
    rules["model"]["vocab"] += [[byte, 0.0] for byte in _BYTES]
    rules["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(rules))


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": _byte_level,
    "BPE with whole words": _whole_words,
    "BPE with marked ends": _marked_ends,
    "BPE with marked insides": _marked_insides,
    "BPE with byte tokens": _byte_fallback,
    "WordPiece": _word_piece,
    "Unigram": _unigram,
    "Unigram with byte tokens": _unigram_bytes,
    "WordLevel": _words,
}


def model_of(
    tokenizer: Tokenizer, *, config: Json | None = None, rows: int | None = None, template: str | None = None
) -> TorchModel:
    """Return a Llama of an embedding and a head alone: row i holds i, and −i."""
    count = tokenizer.get_vocab_size() if rows is None else rows
    info = ModelInfo(
        name="small",
        task="text-generation",
        config={
            "model_type": "llama",
            "vocab_size": count,
            "bos_token_id": None,
            "eos_token_id": None,
            **(config or {}),
        },
        tokenizer={"tokenizer.json": tokenizer.to_str().encode()},
        chat_template=template,
        eos_token_ids=(),
        bos_token_id=None,
        licence=Licence(id="CC0-1.0", source="a test"),
        fingerprint="",
        embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    )
    table = np.repeat(np.arange(count, dtype=np.float32)[:, None], 3, axis=1)
    weights = {"model.embed_tokens.weight": table, "lm_head.weight": -table}
    return TorchModel(info=info, weights=WeightStore({name: stored(name, value) for name, value in weights.items()}))


def tokenizer_of(model: TorchModel) -> Tokenizer:
    """Return a model's tokenizer."""
    return Tokenizer.from_str(model.info.tokenizer["tokenizer.json"].decode())


def cut(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[str]]:
    """Return the tokens of texts as strings."""
    return [row.tokens for row in tokenizer.encode_batch(list(texts))]
