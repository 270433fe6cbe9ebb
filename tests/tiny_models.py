"""Tiny real models: seeded random weights of every family, with a small tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY_TEXT = (
    "The river carried the timber down to the mill, and the mill turned it into boards. "
    "Every spring the water rose, and every spring somebody said it had never risen so high before. "
    "Numbers such as 12, 345 and 6.78 appear; so do names, e.g. Anna, Björn and 王伟. "
) * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BASE: dict[str, Any] = {
    "hidden_size": 112,  # 7 heads of 16
    "intermediate_size": 100,  # not a multiple of 32
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a transformers config of a tiny model."""
    import transformers

    return transformers.AutoConfig.for_model(model_type, **{"vocab_size": 384, **BASE, **changes})


def random_model(config: Any, seed: int = 0) -> Any:
    """Return transformers' model for a config, with weights large enough that its logits differ from each other."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
    return model


def save_tiny_model(path: Path, model_type: str, **changes: Any) -> Path:
    """Write a tiny model as a Hugging Face directory, tokenizer included, and return it."""
    config = tiny_config(model_type, **changes)
    random_model(config).save_pretrained(path)
    save_tiny_tokenizer(path, config.vocab_size)
    return path


def save_tiny_tokenizer(path: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer of `vocab_size` tokens and write its files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
