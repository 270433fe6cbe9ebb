"""Hugging Face directories and hub ids: names, ties, dtypes, and one clear sentence for each kind of damage."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.sources.huggingface import open_directory

SaveLlama = Callable[..., Path]


def change_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file, or make the file."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_of_transformers(save_llama: SaveLlama, dtype: torch.dtype) -> None:
    """Names, dtypes and values are those of the class that saved them, bfloat16 included."""
    directory = save_llama(dtype=dtype)
    opened = open_model(str(directory))
    state = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
    assert set(opened.weights) == set(state)
    assert opened.info.task == "text-generation"
    assert opened.info.name == directory.name
    for name, weight in opened.weights.items():
        value = weight.load()
        assert isinstance(value, np.ndarray)
        assert (str(value.dtype), value.nbytes, value.shape) == (weight.dtype, weight.nbytes, weight.shape)
        np.testing.assert_array_equal(value.astype(np.float32), state[name].float().numpy())


def test_shards_equal_a_single_file(save_llama: SaveLlama) -> None:
    """A sharded checkpoint gives the weights of the same model in one file."""
    single, sharded = open_directory(save_llama()), open_directory(save_llama(shard="100KB"))
    assert set(single.weights) == set(sharded.weights)
    for name in single.weights:
        np.testing.assert_array_equal(single.weights.float32(name), sharded.weights.float32(name))


def test_tied_embedding_is_stored_once(save_llama: SaveLlama) -> None:
    """A tied head is an alias of the embedding."""
    opened = open_directory(save_llama(tied=True))
    assert opened.weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in list(opened.weights)
    assert opened.weights["lm_head.weight"].name == "model.embed_tokens.weight"


@pytest.mark.parametrize("identical", [True, False])
def test_tied_config_with_a_head_in_the_file(save_llama: SaveLlama, identical: bool) -> None:
    """When the config says tied, an identical head is dropped and a different one kept."""
    directory = save_llama(tied=True)
    state = load_file(directory / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    if not identical:
        head[-1, -1] += 1
    save_file({**state, "lm_head.weight": head}, directory / "model.safetensors")
    opened = open_directory(directory)
    assert ("lm_head.weight" in opened.weights.aliases) == identical
    np.testing.assert_array_equal(opened.weights.float32("lm_head.weight"), head.numpy())


@pytest.mark.parametrize("said", [False, None])
def test_missing_head_that_is_not_tied_is_refused(save_llama: SaveLlama, said: bool | None) -> None:
    """The embedding of a model whose head got lost is no head; what a Llama's config leaves out means untied."""
    directory = save_llama(tied=True)
    if said is None:
        config = json.loads((directory / "config.json").read_text())
        del config["tie_word_embeddings"]
        (directory / "config.json").write_text(json.dumps(config))
    else:
        change_json(directory / "config.json", tie_word_embeddings=said)
    with pytest.raises(ConfigError, match=r"has no lm_head\.weight, and its config\.json doesn't tie it"):
        open_directory(directory)


def test_body_without_prefix_gets_it(save_llama: SaveLlama) -> None:
    """Weights saved from the bare LlamaModel get the names they have in LlamaForCausalLM."""
    directory = save_llama(tied=True)
    expected = set(open_directory(directory).weights)
    body = transformers.LlamaModel.from_pretrained(directory)
    body.save_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert set(open_directory(directory).weights) == expected


def test_encoder_head_and_prefix_are_left_out(tmp_path: Path, minilm_directory: Path) -> None:
    """A BertForMaskedLM checkpoint gives BertModel's names."""
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_directory / name, tmp_path)
    opened = open_directory(tmp_path)
    assert opened.info.task == "feature-extraction"
    assert set(opened.weights) == set(transformers.BertModel(config, add_pooling_layer=False).state_dict()) - {
        "embeddings.position_ids"
    }


def test_packaged_minilm(minilm_directory: Path) -> None:
    """The packaged encoder has BertModel's weights and reads its licence from the model card."""
    opened = open_directory(minilm_directory)
    state = transformers.AutoModel.from_pretrained(minilm_directory).state_dict()
    assert set(opened.weights) == set(state)
    for name in ("embeddings.LayerNorm.bias", "encoder.layer.5.output.dense.weight"):
        np.testing.assert_array_equal(opened.weights.float32(name), state[name].numpy())
    assert opened.info.licence.id == "Apache-2.0"
    assert open_model("minilm-l6-v2").info.fingerprint == opened.info.fingerprint


def test_ends_of_text_are_gathered(save_llama: SaveLlama) -> None:
    """The end ids of config, generation config and tokenizer are all kept, in order."""
    directory = save_llama()
    change_json(directory / "config.json", eos_token_id=[7, 3], bos_token_id=1)
    change_json(directory / "generation_config.json", eos_token_id=[3, 11])
    info = open_directory(directory).info
    assert info.eos_token_ids == (2, 3, 7, 11)  # 2: </s> of the tokenizer
    assert info.bos_token_id == 1


def test_chat_template_sources(save_llama: SaveLlama) -> None:
    """chat_template.jinja wins, then tokenizer_config.json's string, or its list's default."""
    directory = save_llama()
    assert open_directory(directory).info.chat_template is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change_json(directory / "tokenizer_config.json", chat_template=named)
    assert open_directory(directory).info.chat_template == "plain"
    change_json(directory / "tokenizer_config.json", chat_template="text")
    assert open_directory(directory).info.chat_template == "text"
    (directory / "chat_template.jinja").write_text("file")
    assert open_directory(directory).info.chat_template == "file"


def test_licence_and_ancestors_from_the_card(save_llama: SaveLlama) -> None:
    """The model card's front matter gives licence and lineage; without one the licence is unknown."""
    directory = save_llama()
    assert open_directory(directory).info.licence.id == "unknown"
    card = "---\nlanguage:\n- en\nlicense: mit\nbase_model:\n  - maker/one\n  - 'maker/two'\n---\n# license: no\n"
    (directory / "README.md").write_text(card)
    licence = open_directory(directory).info.licence
    assert (licence.id, licence.lineage, licence.source) == ("MIT", ("maker/one", "maker/two"), directory.name)
    (directory / "README.md").write_text("---\nlicense: other\nlicense_name: house-licence\nbase_model: a/b\n---\n")
    licence = open_directory(directory).info.licence
    assert (licence.id, licence.lineage) == ("house-licence", ("a/b",))


def test_fingerprint_follows_the_contents(save_llama: SaveLlama, tmp_path: Path) -> None:
    """A moved copy has the same fingerprint; a changed config, tokenizer or weight another."""
    directory = save_llama()
    original = open_directory(directory).info.fingerprint
    for number, name in enumerate(["config.json", "tokenizer_config.json", "model.safetensors"]):
        copy = shutil.copytree(directory, tmp_path / f"copy{number}")
        assert open_directory(copy).info.fingerprint == original
        content = bytearray((copy / name).read_bytes())
        if name.endswith(".json"):
            content += b"\n"
        else:
            content[-1] ^= 1
        (copy / name).write_bytes(content)
        assert open_directory(copy).info.fingerprint != original


def only_pickle(directory: Path) -> None:
    """Leave a checkpoint with a pickle instead of safetensors."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def unlink(name: str) -> Callable[[Path], None]:
    """Return a function that removes a file."""
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Return a function that overwrites a file."""

    def damage(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return damage


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """Return a function that keeps the first part of a file."""

    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def no_tokenizer(directory: Path) -> None:
    """Remove every tokenizer file."""
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def as_adapter(directory: Path) -> None:
    """Leave weights that are called an adapter."""
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")


def two_files_without_index(directory: Path) -> None:
    """Leave two safetensors files and no index."""
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    shutil.copy(directory / "one.safetensors", directory / "two.safetensors")


def integers_for_weights(directory: Path) -> None:
    """Store a weight as int8."""
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unlink("config.json"), "has no config.json"),
        (write("config.json", b"{"), "config.json cannot be read as JSON"),
        (write("config.json", b"\xff\xfe"), "config.json cannot be read as JSON"),
        (write("config.json", b"[]"), "should hold a JSON object, but holds a list"),
        (write("config.json", b"[" * 100_000), "cannot be read as JSON"),
        (unlink("model.safetensors"), "a config.json but no weights"),
        (only_pickle, r"as pickle only \(pytorch_model.bin\).*save_pretrained.*safe_serialization=True"),
        (cut("model.safetensors", 0.9), "truncated or not a safetensors file"),
        (cut("model.safetensors", 0.001), "truncated or not a safetensors file"),
        (write("model.safetensors", b""), "truncated or not a safetensors file"),
        (write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "truncated or not a safetensors file"),
        (write("model.safetensors", b"\x00" * 4096), "truncated or not a safetensors file"),
        (as_adapter, "holds an adapter only"),
        (two_files_without_index, "2 safetensors files but no model.safetensors.index.json"),
        (integers_for_weights, "'lm_head.weight' .* is stored as I8"),
        (no_tokenizer, "has no tokenizer"),
        (cut("tokenizer.json", 0.5), "the tokenizer of .* cannot be read"),
        (write("tokenizer.json", b"{}"), "the tokenizer of .* cannot be read"),
        (write("tokenizer_config.json", b"{]"), "tokenizer_config.json cannot be read as JSON"),
        (write("generation_config.json", b"nope"), "generation_config.json cannot be read as JSON"),
    ],
)
def test_damaged_directory(save_llama: SaveLlama, damage: Callable[[Path], None], words: str) -> None:
    """Each kind of damage is one sentence that says what is wrong."""
    directory = save_llama()
    damage(directory)
    with pytest.raises(ConfigError, match=words) as caught:
        open_model(str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["OneForDepthEstimation"], "model_type": "one"},
            "OneForDepthEstimation, which says",
        ),
        ({"architectures": "LlamaForCausalLM"}, "should be a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized by gptq"),
        ({"quantization_config": None}, "already quantized by an unnamed method"),
    ],
)
def test_unsupported_config(save_llama: SaveLlama, changes: dict[str, Any], words: str) -> None:
    """A model that edgepipe doesn't take is named with what it takes."""
    directory = save_llama()
    change_json(directory / "config.json", **changes)
    with pytest.raises(ConfigError, match=words):
        open_directory(directory)


def test_damaged_shards(save_llama: SaveLlama, tmp_path: Path) -> None:
    """A missing shard, a shard that disagrees with the index and an index that leaves the directory are refused."""
    good = save_llama(shard="100KB")
    index_name = "model.safetensors.index.json"
    index = json.loads((good / index_name).read_text())
    shard = index["weight_map"]["model.norm.weight"]

    missing = shutil.copytree(good, tmp_path / "missing")
    (missing / shard).unlink()
    with pytest.raises(ConfigError, match=f"the shard {shard} of .* is missing"):
        open_directory(missing)

    fewer = shutil.copytree(good, tmp_path / "fewer")
    state = load_file(fewer / shard)
    del state["model.norm.weight"]
    save_file(state, fewer / shard)
    with pytest.raises(ConfigError, match=r"disagrees with the index about 1 tensors, such as 'model\.norm\.weight'"):
        open_directory(fewer)

    outside = shutil.copytree(good, tmp_path / "outside")
    shutil.copy(good / shard, tmp_path / shard)
    index["weight_map"] = {name: f"../{shard}" for name in index["weight_map"]}
    (outside / index_name).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside the model's directory"):
        open_directory(outside)

    (outside / index_name).write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ConfigError, match="has no weight_map"):
        open_directory(outside)


def test_nothing_of_a_directory_is_run(save_llama: SaveLlama) -> None:
    """A directory that brings code for its tokenizer or config does not get it executed."""
    directory = save_llama()
    marker = directory / "ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n\nclass Evil:\n    pass\n")
    change_json(directory / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"})
    change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    open_directory(directory)  # a known family: its own class is used
    change_json(directory / "config.json", model_type="evil")
    change_json(directory / "tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(ConfigError, match=r"can't be opened for text-generation by transformers"):
        open_directory(directory)
    assert not marker.exists()


def test_directory_with_one_gguf(tmp_path: Path) -> None:
    """A directory that holds only GGUF files stands for its one file, and several are listed."""
    (tmp_path / "a.gguf").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"a\.gguf is not a GGUF file"):
        open_model(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files; give one of them: a\.gguf, b\.gguf"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("", "smollm2-135m, minilm-l6-v2"),
        ("./no/such/dir", "no such directory or .gguf file"),
        ("gone.gguf", "no such directory or .gguf file"),
    ],
)
def test_unknown_reference(reference: str, words: str) -> None:
    """A model that is nowhere is answered with what was tried, without a network."""
    with pytest.raises(ConfigError, match=words):
        open_model(reference)


def test_file_of_another_kind(tmp_path: Path) -> None:
    """A file that is no GGUF is refused by name."""
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"model\.bin is a file but not a \.gguf"):
        open_model(str(tmp_path / "model.bin"))


def run_offline(reference: str, hub_cache: Path) -> subprocess.CompletedProcess[str]:
    """Open a model in a process whose hub is switched off: huggingface_hub reads that at import."""
    code = f"""
from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
try:
    model = open_model({reference!r})
    print(model.info.name, model.info.licence.source, len(model.weights))
except ConfigError as error:
    print("ConfigError:", error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)


def test_hub_id_offline(save_llama: SaveLlama, tmp_path: Path) -> None:
    """A hub id is served from the local hub cache without a network, and otherwise named as found nowhere."""
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--maker--tiny"
    shutil.copytree(save_llama(), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert run_offline("maker/tiny", tmp_path / "hub").stdout == "tiny maker/tiny 21\n"
    said = run_offline("maker/absent", tmp_path / "hub").stdout
    assert said.startswith("ConfigError: the model 'maker/absent' was found nowhere: no such directory")
    assert "neither in the local hub cache nor to be had from the hub" in said
