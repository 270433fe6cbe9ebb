"""Hugging Face models: a directory (config.json + safetensors + tokenizer), or a hub id that is downloaded to one.

Only safetensors are read: a pickle can run any code when it is opened. Values of the Llama family are read one tensor
at a time, when somebody asks, and so are those of a student (students/); other families go through transformers'
loader (framework.py). A tied output matrix is an
alias of the embedding. When a config says "tied" but the file also holds an lm_head.weight, the file wins: an identical
one is dropped, a different one is kept.
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
from edgepipe.graph.tasks import task_of
from edgepipe.sources.facts import (
    compress_extra,
    fingerprint,
    read_json,
    spdx,
    token_ids,
)
from edgepipe.sources.framework import FrameworkWeights, read_framework, read_sentence_settings
from edgepipe.sources.tokenizer import TOKENIZER_FILES, TokenizerParts, read_directory_tokenizer
from edgepipe.students.config import is_student
from edgepipe.weights import Weight, WeightStore

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PARTS = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "README.md",
)
# Files that change what a model computes, or say how its input is made.
_SETTINGS = ("preprocessor_config.json", "modules.json", "sentence_bert_config.json", "*/config.json")

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What older checkpoints store beside parameters: transformers computes these and ignores them in a file.
_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")

# Names in the Llama family's …ForCausalLM class.
_BODY = "model."
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

_SLICE_ROWS = 4096  # rows of two embeddings compared at a time


def open_directory(
    directory: Path, *, name: str | None = None, source: str | None = None, task: str | None = None
) -> TorchModel:
    """Open a Hugging Face directory; `name` and `source` default to the directory's own name, `task` to its class's.

    Raises ConfigError when a part is missing, damaged or of a kind that edgepipe doesn't read.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ConfigError(
            f"{directory} has no config.json; expected a Hugging Face model directory (config.json, *.safetensors, "
            "tokenizer files) or a .gguf file"
        )
    config = read_json(config_path)
    task = task_of(config, str(directory), task)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise ConfigError(
            f"{directory} is already quantized by {method}; give the original float model, or a GGUF of it, "
            "which edgepipe imports without loss"
        )
    shards = _shards(directory)
    weights = _read_weights(directory, shards, config, task)
    tokenizer = _tokenizer(directory)
    template = None if is_student(config) else tokenizer.chat_template  # a student was trained on plain texts
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    eos = token_ids(config.get("eos_token_id")) | token_ids(generation.get("eos_token_id")) | tokenizer.eos_token_ids
    if "forced_bos_token_id" in generation:  # newer checkpoints keep it apart from the config
        config = {**config, "forced_bos_token_id": generation["forced_bos_token_id"]}
    bos = token_ids(config.get("bos_token_id")) or token_ids(tokenizer.bos_token_id)
    preprocessor = directory / "preprocessor_config.json"
    settings = [path for name in _SETTINGS for path in sorted(directory.glob(name))]
    parts = [directory / part for part in _PARTS if part != "README.md" and (directory / part).is_file()]
    info = ModelInfo(
        name=name or directory.resolve().name,
        task=task,
        config=config,
        tokenizer=tokenizer.files,
        chat_template=template,
        eos_token_ids=tuple(sorted(eos)),
        bos_token_id=min(bos, default=None),
        licence=_licence(directory, config, source or directory.resolve().name),
        fingerprint=fingerprint([*parts, *settings, *shards]),
        embeddings=weights.embeddings,
        sentence=read_sentence_settings(directory) if task == "feature-extraction" else None,
        preprocessor=preprocessor.read_text(encoding="utf-8") if preprocessor.is_file() else None,
    )
    return TorchModel(info=info, weights=weights.weights)


def _read_weights(directory: Path, shards: list[Path], config: Json, task: str) -> FrameworkWeights:
    """Return weights under the names of the class that will hold them: lazily where edgepipe knows the family."""
    with compress_extra("opening a model"):
        from edgepipe.graph.shape import VARIANTS
        from edgepipe.students.config import embedding_names, head_alias, read_student
    if is_student(config):
        student = read_student(config)
        store = WeightStore(_read_headers(shards), head_alias(student))
        return FrameworkWeights(weights=store, embeddings=embedding_names(student))
    if task != "text-generation" or config.get("model_type") not in VARIANTS:
        return read_framework(directory, config, task)
    weights = _named_for_class(_read_headers(shards))
    aliases = _tie(directory, weights, config)
    return FrameworkWeights(weights=WeightStore(weights, aliases), embeddings=(_EMBEDDING, _HEAD))


def _tokenizer(directory: Path) -> TokenizerParts:
    """Read the tokenizer; a model of images or sound has none, and says so by its preprocessor_config.json."""
    has_one = any((directory / name).is_file() for name in TOKENIZER_FILES)
    if not has_one and (directory / "preprocessor_config.json").is_file():
        return TokenizerParts(files={}, chat_template=None, eos_token_ids=frozenset(), bos_token_id=None)
    return read_directory_tokenizer(directory)


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
        return Path(snapshot_download(hub_id, allow_patterns=[*_PARTS, *_SETTINGS, "*.safetensors"], etag_timeout=10))
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


def _named_for_class(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Give the weights of a Llama the names they have in …ForCausalLM: files of the bare body lack a prefix."""
    if any(name.startswith(_BODY) for name in weights):
        return weights
    return {
        new: _renamed(weight, new)
        for name, weight in weights.items()
        for new in [name if name == _HEAD else _BODY + name]
    }


def _renamed(weight: Weight, name: str) -> Weight:
    return Weight(
        name=name,
        shape=weight.shape,
        dtype=weight.dtype,
        nbytes=weight.nbytes,
        load=weight.load,
    )


def _tie(directory: Path, weights: dict[str, Weight], config: Json) -> dict[str, str]:
    """Return the aliases of tied weights, and drop from `weights` a stored head that equals the embedding.

    Raises ConfigError when the head is missing and the config doesn't say that the embedding stands for it.
    """
    if _EMBEDDING not in weights:  # the stage `export` names it
        return {}
    if _HEAD in weights:
        if not config.get("tie_word_embeddings") or not _equal(weights[_EMBEDDING], weights[_HEAD]):
            return {}
        del weights[_HEAD]
    elif not _says_tied(config):
        raise ConfigError(
            f"{directory} has no lm_head.weight, and its config.json doesn't tie it to the embedding "
            "(tie_word_embeddings): a file of weights is missing, or the config is another model's; copy both again"
        )
    return {_HEAD: _EMBEDDING}


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
