"""Tiny random models of every family that goes through the framework's exporter: config, class, directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tiny_models import save_tiny_tokenizer

_BERT: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 48,  # 3 heads of 16, one and a half groups
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
}
_DECODER: dict[str, Any] = {
    **_BERT,
    "num_key_value_heads": 3,
    "max_position_embeddings": 160,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_T5: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 384,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 160,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_VIT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "image_size": 32,
    "patch_size": 8,
}
_WHISPER: dict[str, Any] = {
    **{k: v for k, v in _BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 32,
}
_WAVES: dict[str, Any] = {
    **{k: v for k, v in _BERT.items() if k != "max_position_embeddings"},
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Say how a tiny model of a family is made."""

    model_type: str
    task: str
    config: dict[str, Any] = field(default_factory=dict)


def _row(model_type: str, task: str, base: dict[str, Any], **changes: Any) -> Family:
    return Family(model_type=model_type, task=task, config={**base, **changes})


EMBED, GENERATE, ANSWER = "feature-extraction", "text-generation", "text2text-generation"
FAMILIES: dict[str, Family] = {
    "albert": _row("albert", EMBED, _BERT, embedding_size=32),
    "bert": _row("bert", EMBED, _BERT),
    "bert as classifier": _row("bert", "text-classification", _BERT, num_labels=3),
    "bert as filler": _row("bert", "fill-mask", _BERT),
    "bert as reader": _row("bert", "question-answering", _BERT),
    "bert as tagger": _row("bert", "token-classification", _BERT, num_labels=5),
    "camembert": _row("camembert", EMBED, _BERT),
    "convbert": _row("convbert", EMBED, _BERT, embedding_size=48),
    "deberta-v2": _row("deberta-v2", EMBED, _BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "distilbert": _row("distilbert", EMBED, {}, vocab_size=384, dim=48, n_layers=2, n_heads=3, hidden_dim=72),
    "distilbert as classifier": _row(
        "distilbert", "text-classification", {}, vocab_size=384, dim=48, n_layers=2, n_heads=3, hidden_dim=72
    ),
    "electra": _row("electra", EMBED, _BERT, embedding_size=32),
    "esm": _row("esm", EMBED, _BERT),
    "ernie": _row("ernie", EMBED, _BERT),
    "modernbert": _row(
        "modernbert",
        EMBED,
        _BERT,
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=0,
        sep_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "mobilebert": _row("mobilebert", EMBED, _BERT, intra_bottleneck_size=48, true_hidden_size=48, embedding_size=48),
    "mpnet": _row("mpnet", EMBED, _BERT),
    "nomic_bert": _row("nomic_bert", EMBED, _BERT),
    "rembert": _row("rembert", EMBED, _BERT, input_embedding_size=32),
    "roberta": _row("roberta", EMBED, _BERT, type_vocab_size=1),
    "roformer": _row("roformer", EMBED, _BERT, embedding_size=48),
    "squeezebert": _row(
        "squeezebert",
        EMBED,
        _BERT,
        embedding_size=48,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=1,
        output_groups=1,
    ),
    "xlm-roberta": _row("xlm-roberta", EMBED, _BERT, type_vocab_size=1),
    "big_bird": _row("big_bird", EMBED, _BERT, attention_type="original_full"),
    "longformer": _row("longformer", EMBED, _BERT, attention_window=8),
    "xlnet": _row("xlnet", EMBED, {}, vocab_size=384, d_model=48, n_layer=2, n_head=3, d_inner=72),
    "funnel": _row(
        "funnel",
        EMBED,
        {},
        vocab_size=384,
        d_model=48,
        n_head=3,
        d_head=16,
        d_inner=72,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        architectures=["FunnelModel"],
    ),
    # pictures
    "vit": _row("vit", EMBED, _VIT),
    "vit as classifier": _row("vit", "image-classification", _VIT, num_labels=4),
    "deit": _row("deit", "image-classification", _VIT, num_labels=4, architectures=["DeiTForImageClassification"]),
    "beit": _row("beit", "image-classification", _VIT, num_labels=4),
    "dinov2": _row("dinov2", EMBED, _VIT),
    "convnext": _row(
        "convnext",
        "image-classification",
        {},
        num_labels=4,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=32,
    ),
    "resnet": _row(
        "resnet", "image-classification", {}, num_labels=4, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
    "swin": _row(
        "swin",
        "image-classification",
        {},
        num_labels=4,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "mobilenet_v2": _row("mobilenet_v2", "image-classification", {}, num_labels=4, image_size=32),
    "siglip_vision_model": _row("siglip_vision_model", EMBED, _VIT),
    "clip_vision_model": _row("clip_vision_model", EMBED, _VIT),
    # sound
    "whisper": _row("whisper", EMBED, _WHISPER),
    "wav2vec2": _row("wav2vec2", EMBED, _WAVES),
    "hubert": _row("hubert", EMBED, _WAVES),
    "wav2vec2 as classifier": _row("wav2vec2", "audio-classification", _WAVES, num_labels=3, classifier_proj_size=16),
    # decoders
    "bloom": _row(
        "bloom", GENERATE, {}, vocab_size=384, hidden_size=48, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=1
    ),
    "codegen": _row("codegen", GENERATE, _GPT2, n_head=4, n_embd=64, rotary_dim=8),
    "cohere": _row("cohere", GENERATE, _DECODER),
    "falcon": _row("falcon", GENERATE, _DECODER, new_decoder_architecture=False, multi_query=True),
    "gemma2": _row("gemma2", GENERATE, _DECODER, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3_text": _row("gemma3_text", GENERATE, _DECODER, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": _row("gpt2", GENERATE, _GPT2),
    "gpt_bigcode": _row("gpt_bigcode", GENERATE, _GPT2),
    "gpt_neo": _row(
        "gpt_neo",
        GENERATE,
        {},
        vocab_size=384,
        hidden_size=48,
        num_layers=2,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=160,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": _row("gpt_neox", GENERATE, _DECODER),
    "gptj": _row("gptj", GENERATE, _GPT2, rotary_dim=8),
    "mamba": _row("mamba", GENERATE, {}, vocab_size=384, hidden_size=48, num_hidden_layers=2, state_size=8),
    "mixtral": _row("mixtral", GENERATE, _DECODER, num_local_experts=2, num_experts_per_tok=1),
    "mpt": _row(
        "mpt",
        GENERATE,
        {},
        vocab_size=384,
        d_model=48,
        n_layers=2,
        n_heads=3,
        max_seq_len=160,
        expansion_ratio=2,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "nemotron": _row("nemotron", GENERATE, _DECODER),
    "olmo2": _row("olmo2", GENERATE, _DECODER),
    "opt": _row(
        "opt",
        GENERATE,
        {},
        vocab_size=384,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=72,
        word_embed_proj_dim=48,
        max_position_embeddings=160,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "phi": _row("phi", GENERATE, _DECODER),
    "phi3": _row("phi3", GENERATE, _DECODER),
    "qwen2_moe": _row(
        "qwen2_moe",
        GENERATE,
        _DECODER,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "stablelm": _row("stablelm", GENERATE, _DECODER),
    "starcoder2": _row("starcoder2", GENERATE, _DECODER),
    "xglm": _row(
        "xglm",
        GENERATE,
        {},
        vocab_size=384,
        d_model=48,
        num_layers=2,
        attention_heads=3,
        ffn_dim=72,
        max_position_embeddings=160,
        bos_token_id=0,
        eos_token_id=1,
    ),
    # encoder-decoders
    "bart": _row("bart", ANSWER, _BART),
    "blenderbot-small": _row("blenderbot-small", ANSWER, _BART),
    "led": _row(
        "led",
        ANSWER,
        _BART,
        attention_window=8,
        max_encoder_position_embeddings=160,
        max_decoder_position_embeddings=160,
    ),
    "longt5": _row("longt5", ANSWER, _T5, local_radius=4, global_block_size=4),
    "m2m_100": _row("m2m_100", ANSWER, _BART),
    "marian": _row("marian", ANSWER, _BART),
    "mbart": _row("mbart", ANSWER, _BART),
    "mt5": _row("mt5", ANSWER, _T5),
    "pegasus": _row("pegasus", ANSWER, _BART),
    "prophetnet": _row(
        "prophetnet",
        ANSWER,
        {},
        vocab_size=384,
        hidden_size=48,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=3,
        num_decoder_attention_heads=3,
        encoder_ffn_dim=72,
        decoder_ffn_dim=72,
        decoder_start_token_id=0,
    ),
    "t5": _row("t5", ANSWER, _T5),
    "umt5": _row("umt5", ANSWER, _T5),
}


def tiny_family(name: str, seed: int = 0) -> Any:
    """Return transformers' model of a family with seeded weights, large enough that outputs differ from each other."""
    import torch
    import transformers

    from edgepipe.graph.tasks import TASKS

    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(family.model_type, **family.config)
    torch.manual_seed(seed)
    auto: Any = getattr(transformers, TASKS[family.task].auto_class)
    model = auto.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_family(path: Path, name: str, seed: int = 0) -> Path:
    """Write a tiny model of a family as a Hugging Face directory and return it."""
    model = tiny_family(name, seed)
    model.save_pretrained(path)
    if model.main_input_name == "input_ids":
        save_text_tokenizer(path, FAMILIES[name].config["vocab_size"])
    else:
        (path / "preprocessor_config.json").write_text('{"do_normalize": true}', encoding="utf-8")
    return path


def save_text_tokenizer(path: Path, vocab_size: int) -> None:
    """Write the tiny tokenizer with special tokens around texts and pairs, as encoders expect them."""
    from tokenizers import Tokenizer, processors

    save_tiny_tokenizer(path, vocab_size)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)],
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
