"""GGUF files: metadata → config and tokenizer; quantized blocks → QuantizedTensors, bit for bit.

gguf_header.py reads and checks the header. Names and the decoding of rare formats come from the `gguf` package,
the meaning of metadata keys from transformers' table.
Source: llama.cpp's convert_hf_to_gguf.py for the row order of queries and keys and for rope_freqs; transformers'
modeling_gguf_pytorch_utils for the way back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import Json, Licence, ModelInfo, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.numerics.gguf_blocks import GRIDS, import_blocks
from edgepipe.sources.facts import compress_extra, fingerprint, spdx, token_ids
from edgepipe.sources.gguf_header import Header, TensorInfo, damaged, read_header
from edgepipe.sources.tokenizer import default_template, read_gguf_tokenizer
from edgepipe.weights import Value, Weight, WeightStore

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Weights of rotary tables that llama.cpp stores as tensors; read by _rope_parameters, never a parameter.
_ROPE_TENSOR = "rope_freqs.weight"

_ENDS = ("eos", "eot")  # end of sequence, end of turn: tokenizer.ggml.…_token_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Say how one GGUF architecture maps to transformers."""

    arch: str  # general.architecture, and here also transformers' model_type
    rotated_rows: bool = False  # rows of attn_q and attn_k are permuted for ggml's rotary layout
    qkv_bias: bool = False  # q, k and v always have biases; else they have when the file holds them
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    family.arch: family
    for family in (
        Family(arch="llama", rotated_rows=True),
        Family(arch="qwen2", qkv_bias=True),
        Family(arch="qwen3", qk_norm=True),
    )
}


def open_gguf(path: Path, *, name: str | None = None, licence: Licence | None = None) -> TorchModel:
    """Open a GGUF file; `name` defaults to the file's stem, `licence` to what the metadata says.

    Raises ConfigError when the file is damaged or of an architecture or format that edgepipe doesn't read.
    """
    with compress_extra("reading a GGUF file"):
        header = read_header(path)
        family = _family(header)
        config = _config(header, family)
        weights = _weights(header, family, config)
    aliases = {} if "output.weight" in header.tensors else {"lm_head.weight": "model.embed_tokens.weight"}
    template = _chat_template(header.metadata)
    tokenizer = read_gguf_tokenizer(path, template)
    metadata = header.metadata
    eos = tokenizer.eos_token_ids.union(*(token_ids(metadata.get(f"tokenizer.ggml.{end}_token_id")) for end in _ENDS))
    bos = token_ids(metadata.get("tokenizer.ggml.bos_token_id"))
    info = ModelInfo(
        name=name or path.stem,
        task="text-generation",
        config=config,
        tokenizer=tokenizer.files,
        chat_template=template,
        eos_token_ids=tuple(sorted(eos)),
        bos_token_id=min(bos, default=tokenizer.bos_token_id),
        licence=licence or _licence(header),
        fingerprint=fingerprint([path]),
        embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    )
    return TorchModel(info=info, weights=WeightStore(weights, aliases))


def _family(header: Header) -> Family:
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise ConfigError(
            f"{header.path} has the architecture {arch!r}; GGUF files of {', '.join(FAMILIES)} are read: for others "
            "give the Hugging Face directory"
        )
    return FAMILIES[arch]


def _number(
    header: Header,
    key: str,
    kind: type[int | float],
    default: float | None = None,
) -> Any:
    """Return a positive number from the metadata; ConfigError when it has none, or something else."""
    value = header.metadata.get(key, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**40:
        raise damaged(
            header.path,
            f"its metadata says {key} = {value!r}, where a positive number is needed",
        )
    return value


def _config(header: Header, family: Family) -> Json:
    """Build the Hugging Face config from metadata; ConfigError when a key is missing or makes no sense."""
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    arch, metadata, tensors = family.arch, header.metadata, header.tensors
    layers = _number(header, f"{arch}.block_count", int)
    hidden = _number(header, f"{arch}.embedding_length", int)
    heads = _number(header, f"{arch}.attention.head_count", int)
    if layers > len(tensors):
        raise damaged(
            header.path,
            f"its metadata claims {layers} layers, but it has {len(tensors)} tensors",
        )
    mapping: dict[str, str | None] = dict(GGUF_CONFIG_MAPPING[arch])  # type: ignore[call-overload]  # untyped table
    fields: Json = {
        name: metadata[f"{arch}.{key}"]
        for key, name in mapping.items()
        if name is not None and f"{arch}.{key}" in metadata
    }
    # As llama.cpp reads them; transformers' table takes Llama's head width from the rotary width, and none for Qwen.
    head_dim = _number(header, f"{arch}.attention.key_length", int, hidden // heads or 1)
    rotary = _number(header, f"{arch}.rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        raise ConfigError(
            f"{header.path} rotates {rotary} of {head_dim} elements of a head; partial rotary positions are not read "
            "from GGUF: give the Hugging Face directory"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(header.path, "it has no tensor token_embd.weight")
    fields |= {
        "head_dim": head_dim,
        "num_key_value_heads": _number(header, f"{arch}.attention.head_count_kv", int, heads),
        "intermediate_size": _number(header, f"{arch}.feed_forward_length", int),
        "max_position_embeddings": _number(header, f"{arch}.context_length", int),
        "rms_norm_eps": _number(header, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope_parameters(header, arch, head_dim),
    }
    fields.pop("rope_theta", None)
    if arch == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
    # The class's own default ids belong to another vocabulary, so each is set, to nothing when the file is silent.
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        ids = token_ids(metadata.get(f"tokenizer.ggml.{key}_token_id"))
        fields[f"{name}_token_id"] = min(ids, default=None)
        if ids and max(ids) >= embedding.shape[0]:
            raise damaged(header.path, f"its {key} token {max(ids)} is not one of its {embedding.shape[0]} tokens")
    try:
        config: Json = AutoConfig.for_model(arch, **fields).to_dict()
    except Exception as error:  # a config class validates with exceptions of several libraries
        raise damaged(header.path, f"transformers refuses its metadata ({error})") from error
    noise = (
        "transformers_version",
        "_name_or_path",
        "id2label",
        "label2id",
        "return_dict",
        "architectures",
    )
    config = {key: value for key, value in config.items() if value is not None and key not in noise}
    return {"architectures": [f"{arch.capitalize()}ForCausalLM"], **config}


def _rope_parameters(header: Header, arch: str, head_dim: int) -> Json:
    """Return the rotary settings, which transformers' GGUF loader reads only in part."""
    metadata, prefix = header.metadata, f"{arch}.rope.scaling"
    theta = _number(header, f"{arch}.rope.freq_base", float, 10000.0)
    kind = metadata.get(f"{prefix}.type", "none")
    if _ROPE_TENSOR in header.tensors:
        return {"rope_theta": theta, **_llama3_scaling(header, theta, head_dim)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        factor = _number(header, f"{prefix}.factor", float)
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_theta": theta,
            "rope_type": "yarn",
            "factor": _number(header, f"{prefix}.factor", float),
            "original_max_position_embeddings": _number(header, f"{prefix}.original_context_length", int),
        }
    raise ConfigError(
        f"{header.path} scales rotary positions by {kind!r}; none, linear, yarn and Llama 3's are read from GGUF: "
        "give the Hugging Face directory"
    )


def _llama3_scaling(header: Header, theta: float, head_dim: int) -> Json:
    """Find the Llama 3 settings that give the stored divisors; ConfigError when none published does.

    llama.cpp stores only the result, one divisor per frequency. Every Llama 3.1 – 3.3 uses low 1, high 4 and an
    original context of 8192; the factor is the largest divisor.
    """
    info = header.tensors[_ROPE_TENSOR]
    low, high, original = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # [head_dim / 2] tokens
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    known = info.type_name == "F32" and info.shape == wavelength.shape
    stored = _load_float(header.path, info) if known else np.zeros(1, np.float32)
    factor = float(stored.max())
    if not (factor > 0 and np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4)):
        raise ConfigError(
            f"{header.path} scales rotary positions by a table ({_ROPE_TENSOR}) that is not Llama 3's; give the "
            "Hugging Face directory"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _parameters(config: Json, family: Family) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face name and shape of every parameter the config asks for."""
    hidden, ffn, dim = (
        config["hidden_size"],
        config["intermediate_size"],
        config["head_dim"],
    )
    queries, keys = (
        config["num_attention_heads"] * dim,
        config["num_key_value_heads"] * dim,
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    bias = family.qkv_bias or bool(config.get("attention_bias"))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (queries, hidden),
            f"{at}.self_attn.k_proj.weight": (keys, hidden),
            f"{at}.self_attn.v_proj.weight": (keys, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, queries),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (ffn, hidden),
            f"{at}.mlp.up_proj.weight": (ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, ffn),
        }
        if bias:
            outs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            if config.get("attention_bias"):
                outs["o_proj"] = hidden
            shapes |= {f"{at}.self_attn.{part}.bias": (out,) for part, out in outs.items()}
        if family.qk_norm:
            shapes |= {f"{at}.self_attn.{part}_norm.weight": (dim,) for part in ("q", "k")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _weights(header: Header, family: Family, config: Json) -> dict[str, Weight]:
    """Describe every parameter; ConfigError unless config and file agree about names and shapes one to one."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == family.arch)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    weights: dict[str, Weight] = {}
    used = {_ROPE_TENSOR}
    for name, shape in _parameters(config, family).items():
        stem, _, leaf = name.rpartition(".")
        gguf_name = f"{names.get_name(stem)}.{leaf}"
        info = header.tensors.get(gguf_name)
        if info is None or info.shape != shape:
            came = "is missing" if info is None else f"has the shape {list(info.shape)}"
            raise damaged(
                header.path,
                f"the tensor {gguf_name} {came}, and its metadata asks for {list(shape)}",
            )
        used.add(gguf_name)
        rotated = heads.get(stem.rpartition(".")[2]) if family.rotated_rows else None
        weights[name] = _weight(header.path, name, info, rotated)
    if unknown := sorted(set(header.tensors) - used):
        raise ConfigError(
            f"{header.path} holds {len(unknown)} tensors that a {family.arch} model has no place for, such as "
            f"{unknown[0]!r}; give the Hugging Face directory"
        )
    return weights


def _weight(path: Path, name: str, info: TensorInfo, heads: int | None) -> Weight:
    """Describe one tensor as it will be given: on its grid, or as floats."""
    load: Callable[[], Value]
    grid = GRIDS.get(info.type_name)
    if grid is not None and len(info.shape) == 2:
        rows, columns = info.shape
        load = partial(_load_grid, path, info, heads)
        nbytes = grid.nbytes((rows, columns))
        return Weight(
            name=name,
            shape=info.shape,
            dtype=f"q{grid.bits}",
            nbytes=nbytes,
            load=load,
            grid=grid.name,
        )
    if info.type_name not in _FLOATS:
        _check_decodable(path, info)
    dtype = _float_dtype(_FLOATS.get(info.type_name, "float32"))
    load = partial(_load_float, path, info, heads)
    nbytes = math.prod(info.shape) * dtype.itemsize
    return Weight(name=name, shape=info.shape, dtype=dtype.name, nbytes=nbytes, load=load)


def _check_decodable(path: Path, info: TensorInfo) -> None:
    """Decode one empty block; ConfigError when gguf cannot decode the format."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.type)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ConfigError(
            f"{path} stores {info.name!r} as {info.type_name}, which cannot be decoded; give another quantization of "
            "this model"
        ) from error


def _raw(path: Path, info: TensorInfo, heads: int | None) -> np.ndarray:
    """Map the bytes of one tensor, row by row, queries and keys in Hugging Face's order: [rows, bytes] uint8.

    ggml interleaves the two halves of each head (rows 0, d/2, 1, d/2 + 1 …). Whole rows move, so codes, scales and
    minima of a row stay together and nothing is lost.
    """
    try:
        raw = np.memmap(path, np.uint8, mode="r", offset=info.start, shape=(info.nbytes,))
    except (OSError, ValueError) as error:
        raise damaged(path, f"it changed since it was opened ({error})") from error
    rows = raw.reshape(math.prod(info.shape[:-1]) if len(info.shape) > 1 else 1, -1)
    if heads is None:
        return np.asarray(rows)
    rows = rows.reshape(info.shape[0], -1)  # a bias permutes its elements
    order = np.arange(info.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return np.asarray(rows[order])


def _float_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401  gives numpy the name "bfloat16"

    return np.dtype(name)


def _load_grid(path: Path, info: TensorInfo, heads: int | None) -> QuantizedTensor:
    rows, columns = info.shape
    value = import_blocks(_raw(path, info, heads).reshape(-1), (rows, columns), GRIDS[info.type_name])
    if not all(np.isfinite(part).all() for part in (value.scale, value.minima) if part is not None):
        raise damaged(path, f"the tensor {info.name!r} has scales or minima that are not finite")
    return value


def _load_float(path: Path, info: TensorInfo, heads: int | None = None) -> np.ndarray:
    raw = _raw(path, info, heads)
    dtype = _FLOATS.get(info.type_name)
    if dtype is not None:
        floats: np.ndarray = np.ascontiguousarray(raw).reshape(-1).view(dtype).reshape(info.shape)
        return floats.copy()  # the map is read-only, and closes when the last view of it goes
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    value: np.ndarray = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(info.type))
    return value.astype(np.float32, copy=False).reshape(info.shape)


def _chat_template(metadata: dict[str, Any]) -> str | None:
    """Return the file's chat template, the one named default when it has several."""
    named = metadata.get("tokenizer.chat_template.default")
    return default_template(metadata.get("tokenizer.chat_template", named))


def _licence(header: Header) -> Licence:
    """Read licence and ancestors from general.license and general.base_model.*."""
    lineage = []
    for index in range(16):  # more ancestors than any merge lists; the count in the file is not trusted
        at = f"general.base_model.{index}"
        url = header.metadata.get(f"{at}.repo_url")
        organization, name = (
            header.metadata.get(f"{at}.organization"),
            header.metadata.get(f"{at}.name"),
        )
        if isinstance(url, str) and (match := re.fullmatch(r"https?://[^/]+/([^/]+/[^/]+?)/?", url)):
            lineage.append(match[1])
        elif isinstance(name, str):
            lineage.append(f"{organization}/{name}" if isinstance(organization, str) else name)
    return Licence(
        id=spdx(header.metadata.get("general.license")),
        source=header.path.name,
        lineage=tuple(lineage),
    )
