"""Write a random-weight Llama of 1.2 billion parameters as sharded bfloat16 safetensors, one tensor at a time.

python -m tests.slow.big_model DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.tiny_models import save_tiny_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
PARAMETERS = 1_235_814_400
_SHARD_BYTES = 500 << 20


def write_big_model(path: Path) -> None:
    """Write config, tokenizer and weights; the tokenizer knows 512 of the 128256 tokens, which is enough to run."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_tiny_tokenizer(path, 512)
    rng = np.random.default_rng(0)
    shard: dict[str, np.ndarray] = {}
    index: dict[str, str] = {}
    files: list[Path] = []

    def flush() -> None:
        file = path / f"model-{len(files):05d}.safetensors"
        save_file(shard, file)
        index.update(dict.fromkeys(shard, file.name))
        files.append(file)
        shard.clear()

    for name, shape in _shapes().items():
        value = np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
        shard[name] = value.astype(ml_dtypes.bfloat16)
        if sum(v.nbytes for v in shard.values()) > _SHARD_BYTES:
            flush()
    flush()
    total = sum(file.stat().st_size for file in files)
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(record), encoding="utf-8")


def _shapes() -> dict[str, tuple[int, ...]]:
    from edgepipe.graph.llama import expected_weights
    from edgepipe.graph.shape import read_shape

    return expected_weights(read_shape(CONFIG, 2048), tied=True)


if __name__ == "__main__":
    write_big_model(Path(sys.argv[1]))
