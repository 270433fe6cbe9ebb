"""Tokenizers: whatever a source has → one tokenizer.json that the runtime opens without transformers.

The ids an app sees must be those of transformers' `tokenizer(text).input_ids`, and transformers does not always use a
directory's tokenizer.json as it lies there: tokenizer_config.json may change the post-processor, add tokens or choose
another class. So the file is written from the backend that transformers builds. Its truncation and padding are
switched off, because `tokenizer(text)` ignores them and `Tokenizer.from_file` would not.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.sources.facts import compress_extra, read_json

# What ends a turn in common chat templates: a model stops there, though config.json often names another token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")

# Written by transformers from where and how it loaded: the same model must give the same bytes anywhere.
_LOCAL_KEYS = (
    "name_or_path",
    "is_local",
    "local_files_only",
    "_commit_hash",
    "special_tokens_map_file",
)

# Any of these makes a directory one that has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """Hold a tokenizer as it travels in ModelInfo."""

    files: dict[str, bytes]  # tokenizer.json, tokenizer_config.json
    chat_template: str | None
    eos_token_ids: frozenset[int]  # the tokenizer's own, and what ends a turn in the chat template
    bos_token_id: int | None


def read_directory_tokenizer(directory: Path) -> TokenizerParts:
    """Read the tokenizer of a Hugging Face directory; ConfigError when there is none or it is damaged."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{directory} has no tokenizer: expected tokenizer.json, or a sentencepiece .model, or vocab.json with "
            "merges.txt; save the model's tokenizer there with tokenizer.save_pretrained"
        )
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    with compress_extra("reading a tokenizer"):
        from transformers import AutoTokenizer
    # local_files_only, no remote code: opening a directory neither downloads nor runs anything.
    tokenizer = _loaded(
        str(directory),
        lambda: AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False),
    )
    jinja = directory / "chat_template.jinja"
    template = _text(jinja) if jinja.is_file() else default_template(config.get("chat_template"))
    return _parts(str(directory), tokenizer, config, template)


def read_gguf_tokenizer(path: Path, template: str | None) -> TokenizerParts:
    """Build the tokenizer that a GGUF file's metadata describes; ConfigError when transformers cannot.

    The class under AutoTokenizer is called directly: AutoTokenizer would first walk the whole metadata with a slow
    reader (8 s for 49,152 tokens), only to learn the architecture; and `from_pretrained` of either would let a stray
    tokenizer_config.json beside the file change it.
    """
    with compress_extra("reading a GGUF tokenizer"):
        from transformers import PreTrainedTokenizerFast
    file = path.resolve()

    def load() -> Any:
        return PreTrainedTokenizerFast(name_or_path=str(file.parent), gguf_file=file.name)  # type: ignore[no-untyped-call]

    tokenizer = _loaded(str(path), load)
    config = dict(tokenizer.init_kwargs)
    keep = (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "add_bos_token",
        "add_eos_token",
    )
    config = {name: config[name] for name in keep if isinstance(config.get(name), (str, bool))}
    return _parts(
        str(path),
        tokenizer,
        {"tokenizer_class": "PreTrainedTokenizerFast", **config},
        template,
    )


def default_template(value: object) -> str | None:
    """Return a chat template from a string, or the one named "default" from a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return str(entry["template"])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); take the file from its source again") from error


def _loaded(source: str, load: Any) -> Any:
    """Call a transformers loader; ConfigError whatever it raises."""
    # Its advice on classes and lengths is for people who train; the ids are checked by our own tests.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        tokenizer = load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # BaseException: a panic in the Rust tokenizers is one
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the tokenizer of {source} cannot be read ({type(error).__name__}: {reason}); "
            "take its files from their source again"
        ) from error
    finally:
        logger.setLevel(level)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"the tokenizer of {source} ({type(tokenizer).__name__}) has no fast form, and the runtime needs one; "
            "convert it to tokenizer.json first"
        )
    return tokenizer


def _parts(source: str, tokenizer: Any, config: Json, template: str | None) -> TokenizerParts:
    """Take the backend without truncation and padding, and the ids that end a text."""
    from tokenizers import Tokenizer

    backend = _loaded_backend(source, Tokenizer, tokenizer.backend_tokenizer)
    ends = {tokenizer.eos_token_id} | {backend.token_to_id(end) for end in _TURN_ENDS if template and end in template}
    kept = {name: value for name, value in config.items() if name not in _LOCAL_KEYS}
    return TokenizerParts(
        files={
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False).encode(),
        },
        chat_template=template,
        eos_token_ids=frozenset(end for end in ends if isinstance(end, int)),
        bos_token_id=tokenizer.bos_token_id,
    )


def _loaded_backend(source: str, factory: Any, backend: Any) -> Any:
    """Copy a backend through its JSON, as the runtime will open it, without truncation and padding."""
    try:
        copy = factory.from_str(backend.to_str())
    except Exception as error:
        raise ConfigError(f"the tokenizer of {source} cannot be written as tokenizer.json ({error})") from error
    copy.no_truncation()
    copy.no_padding()
    return copy
