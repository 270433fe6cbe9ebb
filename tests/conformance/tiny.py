"""The model of the conformance bundles: a Llama of 50,000 parameters, trained for some seconds to speak a little.

Random weights would do for logits, but not for stop strings and end tokens: it must write text, and end it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_models import CHAT_TEMPLATE

LINES = (
    "The river carried the timber down to the mill.",
    "The mill turned the timber into boards, and the boards went down the river.",
    "Every spring the water rose, and nobody said a word.",
    "Numbers such as 12, 345 and 6.78 appear; so do Anna, Björn and 王伟.",
)
TALK = (("Where is the mill?", "Down the river."), ("Who said it?", "Nobody said a word."))
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 288
CONTEXT = 64
_STEPS = 400


def save_trained_model(path: Path) -> Path:
    """Write the model as a Hugging Face directory, tokenizer included, and return it."""
    import torch
    import transformers

    path.mkdir(parents=True)
    tokenizer = save_tokenizer(path)
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = torch.tensor([_padded(tokenizer.encode(text, add_special_tokens=plain).ids) for text, plain in _texts()])
    labels = torch.where(rows == -1, -100, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        model(input_ids=rows.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path


def _texts() -> list[tuple[str, bool]]:
    """Return what it is trained on, and whether special tokens are added as for plain text."""
    start, end = SPECIAL[1:]
    lines = [(line + end, True) for line in LINES]
    return lines + [(f"{start}user\n{q}{end}\n{start}assistant\n{a}{end}", False) for q, a in TALK]


def _padded(ids: list[int]) -> list[int]:
    return (ids + [-1] * CONTEXT)[:CONTEXT]


def save_tokenizer(path: Path) -> Any:
    """Train a byte-level BPE tokenizer that begins a text with <s>, and write its files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, *(text for pair in TALK for text in pair)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer
