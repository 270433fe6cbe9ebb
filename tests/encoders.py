"""Tiny random models with one graph, of any architecture that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepipe.graph.tasks import TASKS
from tests.tiny_models import save_tiny_tokenizer

ENCODER: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}


def save_encoder(path: Path, model_type: str, task: str = "feature-extraction", **changes: Any) -> Path:
    """Write a tiny model of any architecture with a tokenizer, and return its directory."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**ENCODER, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task].auto_class).from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(path)
    save_tiny_tokenizer(path, config.vocab_size)
    return path
