"""Hugging Face models: a directory (config.json + safetensors + tokenizer), or a hub id that is downloaded to one.

Only safetensors are read: a pickle can run any code when it is opened. Values are read one tensor at a time, when
somebody asks. A tied output matrix is an alias of the embedding. When a config says "tied" but the file also holds an
lm_head.weight, the file wins: an identical one is dropped, a different one is kept.
Source: https://huggingface.co/docs/safetensors (format), transformers' index.json for sharded checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgepipe.artifacts import Json, Licence, ModelInfo, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.sources.facts import (
    compress_extra,
    fingerprint,
    read_json,
    spdx,
    task_of,
    token_ids,
)
from edgepipe.sources.tokenizer import TOKENIZER_FILES, read_directory_tokenizer
from edgepipe.weights import Weight, WeightStore

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PARTS = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "README.md",
)

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What older checkpoints store beside parameters: transformers computes these and ignores them in a file.
_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")

# Where a decoder's body lies in its …ForCausalLM class; files saved from the bare body lack the prefix.
_BODY = {
    "gpt2": "transformer.",
    "gpt_neo": "transformer.",
    "falcon": "transformer.",
    "gpt_neox": "gpt_neox.",
}
_HEADS = ("lm_head.", "embed_out.", "score.")
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "gpt_neox.embed_in.weight",
)
# Encoders are used without their training head: bert.embeddings… becomes embeddings…, cls.… is left out.
_ENCODER_BODY = re.compile(r"^(?:bert|roberta|distilbert|electra|mpnet|deberta|albert|camembert|model)\.")

_SLICE_ROWS = 4096  # rows of two embeddings compared at a time


def open_directory(directory: Path, *, name: str | None = None, source: str | None = None) -> TorchModel:
    """Open a Hugging Face directory; `name` and `source` default to the directory's own name.

    Raises ConfigError when a part is missing, damaged or of a kind that edgepipe doesn't read.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ConfigError(
            f"{directory} has no config.json; expected a Hugging Face model directory (config.json, *.safetensors, "
            "tokenizer files) or a .gguf file"
        )
    config = read_json(config_path)
    task = task_of(config, str(directory))
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise ConfigError(
            f"{directory} is already quantized by {method}; give the original float model, or a GGUF of it, "
            "which edgepipe imports without loss"
        )
    shards = _shards(directory)
    weights = _named_for_class(_read_headers(shards), config, task)
    aliases = _tie(directory, weights, config, task)
    tokenizer = read_directory_tokenizer(directory)
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    eos = token_ids(config.get("eos_token_id")) | token_ids(generation.get("eos_token_id")) | tokenizer.eos_token_ids
    bos = token_ids(config.get("bos_token_id")) or token_ids(tokenizer.bos_token_id)
    parts = [directory / part for part in _PARTS if part != "README.md" and (directory / part).is_file()]
    info = ModelInfo(
        name=name or directory.resolve().name,
        task=task,
        config=config,
        tokenizer=tokenizer.files,
        chat_template=tokenizer.chat_template,
        eos_token_ids=tuple(sorted(eos)),
        bos_token_id=min(bos, default=None),
        licence=_licence(directory, config, source or directory.resolve().name),
        fingerprint=fingerprint([*parts, *shards]),
    )
    return TorchModel(info=info, weights=WeightStore(weights, aliases))


def download(hub_id: str) -> Path:
    """Download "org/name" and return its directory; offline, return the hub cache's copy. ConfigError when neither is.

    Takes config, tokenizer and safetensors only: no pickles, no code.
    """
    with compress_extra("taking a model from the hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*_PARTS, "*.safetensors"], etag_timeout=10))
    except HFValidationError as error:
        raise ConfigError(f"{hub_id!r} is not a hub id of the form org/name ({error})") from error
    # OSError: connections that break; httpx's own errors are OSErrors' cousins and arrive as LocalEntryNotFoundError.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the hub model {hub_id} is neither in the local hub cache nor to be had from the hub ({reason})"
        ) from error


def _shards(directory: Path) -> list[Path]:
    """Return the safetensors files of a model, sorted; ConfigError when there are none or one is missing."""
    single = directory / "model.safetensors"
    index_path = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index_path.is_file():
        return _indexed_shards(directory, index_path)
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1 and not found[0].name.startswith("adapter"):
        return found
    if len(found) > 1:
        raise ConfigError(
            f"{directory} has {len(found)} safetensors files but no model.safetensors.index.json that says what is "
            "where; copy the index from the model's source"
        )
    if found:
        raise ConfigError(f"{directory} holds an adapter only ({found[0].name}); merge it into its base model first")
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{directory} has its weights as pickle only ({pickles[0]}), which may run any code when opened; convert "
            "it in an environment you trust with model.save_pretrained(directory, safe_serialization=True)"
        )
    raise ConfigError(f"{directory} has a config.json but no weights; expected model.safetensors or its shards")


def _indexed_shards(directory: Path, index_path: Path) -> list[Path]:
    """Return the shards an index names, after comparing what they hold with what the index says."""
    mapping = read_json(index_path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise ConfigError(
            f"{index_path} has no weight_map of tensor name → file; take it from the model's source again"
        )
    shards = []
    for file in sorted(set(mapping.values())):
        if Path(file).name != file or file in (".", ".."):
            raise ConfigError(f"{index_path} names the file {file!r}, which is outside the model's directory")
        if not (directory / file).is_file():
            raise ConfigError(f"the shard {file} of {directory} is missing; take it from the model's source again")
        held = set(_open(directory / file).keys())
        said = {name for name, where in mapping.items() if where == file}
        if held != said:
            odd = sorted(held ^ said)
            raise ConfigError(
                f"the shard {file} of {directory} disagrees with the index about {len(odd)} tensors, such as "
                f"{odd[0]!r}; take index and shards from the same source again"
            )
        shards.append(directory / file)
    return shards


def _open(path: Path) -> Any:
    """Open one safetensors file; ConfigError when it is truncated or damaged."""
    with compress_extra("reading safetensors"):
        import ml_dtypes  # noqa: F401  gives numpy the name "bfloat16", which safetensors' numpy reader asks for
        from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is truncated or not a safetensors file ({error}); take it from its source again"
        ) from error


def _read_headers(shards: Iterable[Path]) -> dict[str, Weight]:
    """Describe every parameter in the shards without reading any."""
    weights: dict[str, Weight] = {}
    for path in shards:
        handle = _open(path)
        for name in sorted(handle.keys()):
            if _BUFFERS.search(name):
                continue
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ConfigError(
                    f"{name!r} in {path} is stored as {part.get_dtype()}; expected {', '.join(sorted(_DTYPES))}: give "
                    "the original float model"
                )
            shape = tuple(int(n) for n in part.get_shape())
            nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            load = partial(_load, path, name)
            weights[name] = Weight(name=name, shape=shape, dtype=dtype, nbytes=nbytes, load=load)
    return weights


def _load(path: Path, name: str) -> np.ndarray:
    """Read one tensor and let the file go."""
    value: np.ndarray = _open(path).get_tensor(name)
    return value


def _named_for_class(weights: dict[str, Weight], config: Json, task: str) -> dict[str, Weight]:
    """Give the weights the names they have in the class that will hold them."""
    if task == "feature-extraction":
        bodied = {name: _ENCODER_BODY.sub("", name) for name in weights if _ENCODER_BODY.match(name)}
        # Without a prefix the file was saved from the bare encoder; with one, whatever lacks it is a training head.
        return {new: _renamed(weights[old], new) for old, new in bodied.items()} if bodied else weights
    body = _BODY.get(str(config.get("model_type")), "model.")
    if any(name.startswith(body) for name in weights):
        return weights
    return {
        new: _renamed(weight, new)
        for name, weight in weights.items()
        for new in [name if name.startswith(_HEADS) else body + name]
    }


def _renamed(weight: Weight, name: str) -> Weight:
    return Weight(
        name=name,
        shape=weight.shape,
        dtype=weight.dtype,
        nbytes=weight.nbytes,
        load=weight.load,
    )


def _tie(directory: Path, weights: dict[str, Weight], config: Json, task: str) -> dict[str, str]:
    """Return the aliases of tied weights, and drop from `weights` a stored head that equals the embedding.

    Raises ConfigError when the head is missing and the config doesn't say that the embedding stands for it.
    """
    embedding = next((name for name in _EMBEDDINGS if name in weights), None)
    if task != "text-generation" or embedding is None or "embed_out.weight" in weights:
        return {}
    if "lm_head.weight" in weights:
        if not config.get("tie_word_embeddings") or not _equal(weights[embedding], weights["lm_head.weight"]):
            return {}
        del weights["lm_head.weight"]
    elif not _says_tied(config):
        raise ConfigError(
            f"{directory} has no lm_head.weight, and its config.json doesn't tie it to the embedding "
            "(tie_word_embeddings): a file of weights is missing, or the config is another model's; copy both again"
        )
    return {"lm_head.weight": embedding}


def _says_tied(config: Json) -> bool:
    """Tell whether the config ties head and embedding; a config that says nothing means its class's default."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from edgepipe.graph.reference import framework_config

    return bool(framework_config(config).tie_word_embeddings)


def _equal(one: Weight, other: Weight) -> bool:
    """Compare two stored matrices bit by bit, some rows at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # The loads above are partial(_load, path, stored name): their slices are read instead of the whole.
    places = [cast("partial[np.ndarray]", weight.load).args for weight in (one, other)]
    first, second = (_open(path).get_slice(name) for path, name in places)
    rows = one.shape[0]
    spans = [slice(start, min(rows, start + _SLICE_ROWS)) for start in range(0, rows, _SLICE_ROWS)]
    return all(first[span].tobytes() == second[span].tobytes() for span in spans)


def _licence(directory: Path, config: Json, source: str) -> Licence:
    """Read licence and ancestors from the model card's front matter, the licence else from the config."""
    card = _front_matter(directory / "README.md")
    named = card.get("license", [])
    if named == ["other"]:  # the hub's word for a licence with a name of its own
        named = card.get("license_name", named)
    licence = named[0] if named else config.get("license")
    return Licence(id=spdx(licence), source=source, lineage=tuple(card.get("base_model", ())))


def _front_matter(path: Path) -> dict[str, list[str]]:
    """Read the scalars and plain lists of a model card's YAML header; nothing when there is none.

    Two keys are wanted, so no YAML parser is run on a stranger's file.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(1 << 20).splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        if item := re.match(r"\s*-\s+(.+)$", line):
            if key:
                found[key].append(item[1].strip().strip("'\""))
        elif pair := re.match(r"([\w-]+):\s*(.*)$", line):
            key, value = pair[1], pair[2].strip().strip("'\"")
            found[key] = [value] if value else []
    return {}
