"""GGUF: what is read equals what was written and what transformers reads; what is damaged ends in one sentence."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader

from edgepipe.artifacts import QuantizedTensor
from edgepipe.errors import ConfigError, EdgepipeError
from edgepipe.numerics.gguf_blocks import GRIDS
from edgepipe.sources.gguf import open_gguf
from edgepipe.sources.gguf_header import read_header
from edgepipe.weights import WeightStore

from .conftest import make_decoder

Writer = Callable[..., Path]
ARCHS = ("llama", "qwen2", "qwen3")
Q = GGMLQuantizationType
MIXED = {
    "embed_tokens": Q.Q8_0,
    "lm_head": Q.F16,
    "q_proj": Q.Q4_0,
    "k_proj": Q.Q4_1,
    "v_proj": Q.Q5_0,
    "o_proj": Q.Q5_1,
    "gate_proj": Q.BF16,
    "up_proj": Q.F32,
    "down_proj": Q.TQ2_0,  # a format that is decoded when it is read
}


def state_of_transformers(path: Path) -> dict[str, torch.Tensor]:
    """Load a GGUF file through transformers, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return dict(model.state_dict())


def assert_same_weights(store: WeightStore, state: dict[str, torch.Tensor]) -> None:
    """Compare every weight, aliases included, exactly."""
    assert {*store, *store.aliases} == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(store.float32(name), tensor.float().numpy(), err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_float_file_gives_back_the_original_weights(write_gguf: Writer, arch: str, tied: bool) -> None:
    """Llama's query and key rows come back in Hugging Face's order, Qwen's are left where they are."""
    model = make_decoder(arch, tied=tied)
    opened = open_gguf(write_gguf(model, arch))
    assert_same_weights(opened.weights, model.state_dict())
    assert opened.weights.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


@pytest.mark.parametrize("arch", ARCHS)
def test_mixed_formats_equal_transformers(write_gguf: Writer, arch: str) -> None:
    """Every format, kept on its grid or decoded, has the values that transformers' own loader gives."""
    path = write_gguf(make_decoder(arch, tied=False), arch, formats=MIXED)
    assert_same_weights(open_gguf(path).weights, state_of_transformers(path))


def test_records_describe_what_loads(write_gguf: Writer) -> None:
    """Names, dtypes, grids and byte counts are known before a value is read, and are those of the value."""
    weights = open_gguf(write_gguf(make_decoder("llama", tied=False), "llama", formats=MIXED)).weights
    kinds = {name.split(".")[-2]: (weight.dtype, weight.grid) for name, weight in weights.items()}
    assert kinds["embed_tokens"] == ("q8", "Q8_0")
    assert kinds["q_proj"] == ("q4", "Q4_0")
    assert kinds["v_proj"] == ("q8", "Q5_0")
    assert kinds["lm_head"] == ("float16", None)
    assert kinds["gate_proj"] == ("bfloat16", None)
    assert kinds["down_proj"] == ("float32", None)
    for weight in weights.values():
        value = weight.load()
        assert value.nbytes == weight.nbytes
        assert value.shape == weight.shape
        assert (value.source_grid if isinstance(value, QuantizedTensor) else None) == weight.grid


@pytest.mark.parametrize("arch", ARCHS)
def test_config_equals_transformers(write_gguf: Writer, arch: str) -> None:
    """Every field that transformers' own reader finds is there with the same value."""
    path = write_gguf(make_decoder(arch, tied=True), arch)
    theirs = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    ours = open_gguf(path).info.config
    ids = {"eos_token_id", "bos_token_id", "pad_token_id"}  # transformers keeps the class's defaults
    noise = {"_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "return_dict"}
    for key in set(theirs) - noise - ids:
        if theirs[key] is not None and key in ours:
            assert ours[key] == theirs[key], key
    assert {key for key in theirs if theirs[key] is not None} - noise - ids <= set(ours)
    assert ours["architectures"] == [f"{arch.capitalize()}ForCausalLM"]


def test_ids_come_from_the_file_alone(write_gguf: Writer) -> None:
    """The end of text is the file's and the template's, never the config class's default id."""
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    path = write_gguf(make_decoder("llama", tied=True), "llama", metadata={"tokenizer.chat_template": template})
    info = open_gguf(path).info
    assert info.eos_token_ids == (397, 399)
    assert info.bos_token_id is None
    assert "bos_token_id" not in info.config
    assert info.config["eos_token_id"] == 397
    assert info.chat_template == template


def test_head_width_of_qwen3_is_read(write_gguf: Writer) -> None:
    """A head width in the metadata wins over the config class's default."""
    common = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 400}
    config = transformers.Qwen3Config(**common, num_attention_heads=2, num_key_value_heads=1, head_dim=48)
    model = transformers.Qwen3ForCausalLM(config)
    opened = open_gguf(write_gguf(model, "qwen3"))
    assert opened.info.config["head_dim"] == 48
    assert_same_weights(opened.weights, model.state_dict())


def test_llama3_rotary_scaling_is_recovered(write_gguf: Writer) -> None:
    """The stored table of divisors becomes the settings it was made from; any other table is refused."""
    model = make_decoder("llama", tied=True)
    settings = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    scaled = transformers.LlamaConfig(**{**model.config.to_dict(), "rope_parameters": settings})
    plain = 500000.0 ** -(np.arange(0, 32, 2) / 32)
    inverse = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].numpy()
    divisors = (plain / inverse).astype(np.float32)
    model.config.rope_parameters = {"rope_theta": 500000.0, "rope_type": "default"}
    opened = open_gguf(write_gguf(model, "llama", extra_tensors={"rope_freqs.weight": divisors}))
    assert opened.info.config["rope_parameters"] == pytest.approx(settings)
    assert "rope_freqs.weight" not in opened.weights
    odd = np.linspace(1, 8, 16, dtype=np.float32)
    path = write_gguf(model, "llama", extra_tensors={"rope_freqs.weight": odd}, name="odd.gguf")
    with pytest.raises(ConfigError, match="not Llama 3's"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rotary_scaling_is_read(write_gguf: Writer, metadata: dict[str, object], expected: dict[str, object]) -> None:
    """Scaling in the metadata, which transformers' GGUF loader ignores, reaches the config."""
    model = make_decoder("qwen2", tied=True)
    written = {f"qwen2.rope.scaling.{key}": value for key, value in metadata.items()}
    found = open_gguf(write_gguf(model, "qwen2", metadata=written)).info.config["rope_parameters"]
    assert {key: found[key] for key in expected} == expected


def test_licence_and_ancestors(write_gguf: Writer) -> None:
    """Licence and lineage come from general.license and general.base_model.*."""
    metadata = {
        "general.license": "apache-2.0",
        "general.base_model.0.repo_url": "https://example.org/maker/parent-1b",
        "general.base_model.1.name": "Grandparent",
        "general.base_model.1.organization": "Maker",
    }
    licence = open_gguf(write_gguf(make_decoder("llama", tied=True), "llama", metadata=metadata)).info.licence
    assert licence.id == "Apache-2.0"
    assert licence.lineage == ("maker/parent-1b", "Maker/Grandparent")
    silent = open_gguf(write_gguf(make_decoder("llama", tied=True), "llama", name="silent.gguf")).info.licence
    assert (silent.id, silent.source, silent.lineage) == ("unknown", "silent.gguf", ())


def test_fingerprint_is_of_the_contents(write_gguf: Writer, tmp_path: Path) -> None:
    """A copy has the same fingerprint, a changed byte of a weight another."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    content = bytearray(path.read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(content)
    assert open_gguf(copy).info.fingerprint == open_gguf(path).info.fingerprint
    content[-1] ^= 1
    copy.write_bytes(content)
    assert open_gguf(copy).info.fingerprint != open_gguf(path).info.fingerprint


def test_header_agrees_with_ggufs_own_reader(write_gguf: Writer) -> None:
    """Our checked reader finds the same metadata and tensors as gguf's."""
    path = write_gguf(make_decoder("llama", tied=False), "llama", formats=MIXED)
    theirs, ours = GGUFReader(path), read_header(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == (
        ours.metadata
    )
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, info.start, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert list(reversed(info.shape)) == tensor.shape.tolist()
    assert len(theirs.tensors) == len(ours.tensors)


def test_every_truncation_is_refused(write_gguf: Writer, tmp_path: Path) -> None:
    """A file cut anywhere, in header or data, is called truncated or unreadable."""
    content = write_gguf(make_decoder("llama", tied=True), "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = {*range(0, 64), *np.linspace(64, len(content) - 33, 300).astype(int).tolist()}
    for length in sorted(lengths):
        cut.write_bytes(content[:length])
        with pytest.raises(ConfigError, match="is not a GGUF file that can be read"):
            open_gguf(cut)


def test_flipped_header_bytes_never_crash(write_gguf: Writer, tmp_path: Path) -> None:
    """Random damage to the header ends in our own error or in a model that opens, quickly either way."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    content = path.read_bytes()
    header_end = min(info.start for info in read_header(path).tensors.values())
    rng = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    # A third each in the counts, in the keys before the vocabulary and anywhere.
    spots = np.concatenate([rng.integers(0, 24, 60), rng.integers(24, 700, 60), rng.integers(0, header_end, 60)])
    for spot in spots.tolist():
        changed = bytearray(content)
        changed[spot] ^= int(rng.integers(1, 256))
        damaged.write_bytes(changed)
        start = time.perf_counter()
        try:
            open_gguf(damaged)
        except EdgepipeError:
            refused += 1
        assert time.perf_counter() - start < 5
    assert refused > 60


def poke(path: Path, offset: int, layout: str, *values: int) -> None:
    """Overwrite values in a file."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "words"),
    [
        (0, "<I", 0x12345678, "instead of b'GGUF'"),
        (4, "<I", 1, "version 1"),
        (4, "<I", 3 << 24, "big-endian"),
        (8, "<Q", 2**60, "claims 1152921504606846976 tensors"),
        (16, "<Q", 2**60, "1152921504606846976 metadata keys"),
        (24, "<Q", 2**62, "truncated"),
    ],
)
def test_absurd_headers(write_gguf: Writer, offset: int, layout: str, value: int, words: str) -> None:
    """A wrong magic, version, count or length is named, and nothing of that size is allocated."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    poke(path, offset, layout, value)
    with pytest.raises(ConfigError, match=words):
        open_gguf(path)


def test_endless_array_is_refused(tmp_path: Path) -> None:
    """An array of 2^60 empty strings is refused at once, not walked."""
    key = b"a.list"
    path = tmp_path / "endless.gguf"
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(header + struct.pack("<IIQ", 9, 8, 2**60))
    with pytest.raises(ConfigError, match="claim 1152921504606846976 elements"):
        open_gguf(path)


def test_tensor_beyond_the_file_is_refused(write_gguf: Writer) -> None:
    """A tensor whose data would lie past the end is refused before it is mapped."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    at = path.read_bytes().index(b"output_norm.weight") + len(b"output_norm.weight")
    poke(path, at + 4 + 8 + 4, "<Q", 2**40)
    with pytest.raises(ConfigError, match=r"truncated: the tensor 'output_norm\.weight'"):
        open_gguf(path)


def test_more_layers_than_tensors(write_gguf: Writer) -> None:
    """A layer count that the file cannot hold is refused before names are made for it."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    at = path.read_bytes().index(b"llama.block_count") + len(b"llama.block_count")
    poke(path, at + 4, "<I", 2**31)
    with pytest.raises(ConfigError, match="claims 2147483648 layers"):
        open_gguf(path)


def test_end_of_text_outside_the_vocabulary(write_gguf: Writer) -> None:
    """A special token that the vocabulary doesn't have is refused."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    at = path.read_bytes().index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id")
    poke(path, at + 4, "<I", 400)
    with pytest.raises(ConfigError, match="its eos token 400 is not one of its 400 tokens"):
        open_gguf(path)


def test_missing_unknown_and_misshapen_tensors(write_gguf: Writer) -> None:
    """Config and tensors must agree one to one."""
    model = make_decoder("llama", tied=True)
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight is missing"):
        open_gguf(write_gguf(model, "llama", leave_out="blk.1.ffn_up.weight"))
    extra = {"blk.0.adapter.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(ConfigError, match=r"no place for, such as 'blk\.0\.adapter\.weight'"):
        open_gguf(write_gguf(model, "llama", extra_tensors=extra, name="extra.gguf"))
    model.config.intermediate_size = 128
    with pytest.raises(ConfigError, match=r"has the shape \[256, 64\], and its metadata asks for \[128, 64\]"):
        open_gguf(write_gguf(model, "llama", name="shape.gguf"))


def test_unknown_architecture(write_gguf: Writer) -> None:
    """Another architecture is named, with those that are read."""
    with pytest.raises(ConfigError, match="architecture 'mamba'; GGUF files of llama, qwen2, qwen3 are read"):
        open_gguf(write_gguf(make_decoder("llama", tied=True), "mamba"))


def test_file_that_changes_later(write_gguf: Writer) -> None:
    """A file cut after it was opened fails with a sentence when a weight is asked for."""
    path = write_gguf(make_decoder("llama", tied=True), "llama")
    weights = open_gguf(path).weights
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="changed since it was opened"):
        weights.load("model.norm.weight")


@pytest.mark.parametrize(("kind", "offset"), [(Q.Q4_0, 0), (Q.Q4_1, 0), (Q.Q4_1, 2), (Q.Q8_0, 0)])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_scale_or_minimum_that_is_not_finite_is_refused(
    write_gguf: Writer, kind: GGMLQuantizationType, offset: int, value: float
) -> None:
    """Kept exactly, it would make a row of NaN: the tensor is named when it is read."""
    path = write_gguf(make_decoder("llama", tied=True), "llama", formats={"down_proj": kind})
    name = "blk.1.ffn_down.weight"
    poke(path, read_header(path).tensors[name].start + offset, "<e", value)
    weights = open_gguf(path).weights
    with pytest.raises(ConfigError, match=f"the tensor '{name}' has scales or minima that are not finite"):
        weights.load("model.layers.1.mlp.down_proj.weight")
    weights.load("model.layers.0.mlp.down_proj.weight")


def test_packaged_smollm2(smollm2_gguf: Path) -> None:
    """The packaged decoder has its shape, its chat tokens and 5.7 bits a weight."""
    opened = open_gguf(smollm2_gguf)
    info = opened.info
    assert (info.config["num_hidden_layers"], info.config["hidden_size"], info.config["head_dim"]) == (30, 576, 64)
    assert (info.eos_token_ids, info.bos_token_id) == ((2,), 1)
    assert info.chat_template is not None
    assert "<|im_start|>" in info.chat_template
    assert {weight.grid for weight in opened.weights.values()} == {"Q4_1", "Q8_0", None}
    assert opened.weights.nbytes * 8 / opened.weights.parameters == pytest.approx(5.74, abs=0.01)
    assert set(GRIDS) >= {"Q4_1", "Q8_0"}


@pytest.mark.slow
def test_packaged_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    """Every tensor of the packaged decoder, decoded, equals transformers' float32 exactly."""
    opened = open_gguf(smollm2_gguf)
    assert_same_weights(opened.weights, state_of_transformers(smollm2_gguf))
    theirs = transformers.AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "vocab_size", "max_position_embeddings"):
        assert opened.info.config[key] == getattr(theirs, key)
