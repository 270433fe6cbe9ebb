"""Read and check a bundle directory: the manifest and the files it names.

A bundle may come from anywhere, so nothing in the manifest is believed before it is checked: types, ranges, and that
every path stays inside the directory. `read_bundle` compares sizes; `verify_hashes` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime.ends import DTYPES, ROLES, check_ends
from edgepipe.runtime.packed import MOST_RATIO

MANIFEST = "manifest.json"
SCHEMA = 3  # the newest manifest layout this code reads; `_newest` says what the older ones lack

# Limits that no real bundle comes near; beyond them a manifest is damaged or hostile.
_MOST_MANIFEST_BYTES = 16 << 20
_MOST_TOKENIZER_BYTES = 512 << 20
_MOST_TEMPLATE_BYTES = 1 << 20
_MOST_FILE_BYTES = 1 << 42
_MOST_CACHE_BYTES = 1 << 40
_MOST_NAME = 255  # characters of a file's name, its folders included
_MOST_PART = 63  # characters of one part of it: file systems take 255 bytes, and a character has up to 4
_MOST_LAYERS = 4096
_MOST_HEADS = 4096
_MOST_HEAD_DIM = 65536
_MOST_VOCABULARY = 1 << 24
_MOST_CONTEXT = 1 << 26

GENERATION = ("text-generation", "text2text-generation")  # tasks with a cache of keys and values
_CACHE_KINDS = ("preallocated", "growing")
_CACHE_DTYPES = ("float32", "float16", "int8", "uint16")
_NOT_PLAIN = re.compile(r"[\\:\x00-\x1f\x7f\ud800-\udfff]")  # in a file's name
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Hold a checked bundle: every path below exists inside `path` and has the size the manifest states."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Path | None  # None: the model reads no text
    chat_template: str | None  # Jinja source


def read_bundle(path: str | Path) -> Bundle:
    """Return the bundle in directory `path`, its manifest checked and its files' sizes compared.

    Raises ConfigError when `path` is no bundle or its manifest is malformed, ContractError when a file is missing or
    has another size than the manifest states.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, facts in manifest["files"].items():
        file = _inside(path, name)
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise ContractError(
                f"{name} should have {facts['bytes']} bytes but has {size}: the bundle is damaged, copy it again"
            )
    tokenizer = manifest["tokenizer"]
    template = None if tokenizer is None else tokenizer["chat_template"]
    return Bundle(
        path=path,
        manifest=manifest,
        tokenizer=None if tokenizer is None else path / tokenizer["file"],
        chat_template=None if template is None else _read_text(path / template),
    )


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the checked manifest of the bundle in directory `path`; raise ConfigError when it is none."""
    path = Path(path)
    file = path / MANIFEST
    if file.is_symlink():
        raise ConfigError(f"a bundle may hold no links, but {file} is one: do not use it")
    if path.is_dir() and file.exists() and not file.is_file():  # opening a pipe would wait for its writer
        raise ConfigError(f"expected a bundle directory, but {file} is no regular file: give the one a build wrote")
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_MANIFEST_BYTES + 1)
    except OSError:
        what = "has no manifest.json" if path.is_dir() else "is not a directory" if path.exists() else "does not exist"
        raise ConfigError(f"expected a bundle directory, but {path} {what}: give the directory a build wrote") from None
    if len(content) > _MOST_MANIFEST_BYTES:
        raise ConfigError(f"manifest.json may have {_MOST_MANIFEST_BYTES} bytes at most, but {file} has more")
    try:
        manifest = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    return _check_manifest(manifest)


def verify_hashes(path: str | Path, manifest: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Read files of the bundle, by default all, and compare their sha256 with the manifest.

    Raises ContractError when one differs.
    """
    path = Path(path)
    for name in manifest["files"] if names is None else names:
        facts = manifest["files"][name]
        with _inside(path, name).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != facts["sha256"]:
            raise ContractError(
                f"{name} should have sha256 {facts['sha256']} but has {found}: "
                "the bundle was changed or damaged, copy or build it again"
            )


def _refuse_constant(constant: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's reader would take."""
    raise ValueError(f"{constant} is not a JSON number")


def _check_manifest(manifest: object) -> dict[str, Any]:
    """Return a manifest in the newest layout; ConfigError at the first thing missing, of another type or range."""
    if not isinstance(manifest, dict):
        raise ConfigError(f"manifest.json must hold an object, but holds {_kind(manifest)}")
    schema = _whole(manifest, "schema", 1, 1 << 31)
    if schema > SCHEMA:
        raise ConfigError(
            f"this bundle has manifest schema {schema}, but this edgepipe reads up to {SCHEMA}: update edgepipe"
        )
    manifest = _newest(manifest, schema)
    for name in ("edgepipe", "name", "task", "engine"):
        _text(manifest, name)
    files = _object(manifest, "files")
    for name in files:
        _check_plain_name(name)
        facts = _object(files, name, "files.")
        _whole(facts, "bytes", 0, _MOST_FILE_BYTES, f"files.{name}.")
        if not _SHA256.fullmatch(_text(facts, "sha256", f"files.{name}.")):
            raise ConfigError(f"manifest.json: files.{name}.sha256 must be 64 hex digits, in small letters")

    _check_graphs(manifest, files)
    if manifest["task"] in GENERATION:
        _check_generation(manifest)
    else:
        _check_model(manifest)
    check_ends(manifest)
    _check_tokenizer(manifest, files)
    if _key(manifest, "preprocessor") is not None:
        _listed(files, _text(manifest, "preprocessor"), "preprocessor", _MOST_TEMPLATE_BYTES)
    return manifest


def _newest(manifest: dict[str, Any], schema: int) -> dict[str, Any]:
    """Return a manifest with what layouts before the newest left unsaid; its own `schema` stays."""
    if schema == 1:  # decoders with a preallocated cache only
        cache = manifest.get("cache")
        cache = {"kind": "preallocated", **cache} if isinstance(cache, dict) else cache
        manifest = {**manifest, "ends": {}, "preprocessor": None, "cache": cache}
    return manifest


def _check_graphs(manifest: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Check graphs and weights."""
    graphs = _object(manifest, "graphs")
    for role in ROLES.get(manifest["task"], ("model",)):
        if role not in graphs:
            raise ConfigError(f"manifest.json: graphs must name {role}, but does not")
    for role in graphs:
        _listed(files, _text(graphs, role, "graphs."), f"graphs.{role}")
    for role, ends in _object(manifest, "ends").items():
        if role not in graphs:
            raise ConfigError(f"manifest.json: ends describe {role!r}, which graphs does not list")
        for kind in ("inputs", "outputs"):
            described = _object(_object({role: ends}, role, "ends."), kind, f"ends.{role}.")
            for name in described:
                _check_end(described, name, f"ends.{role}.{kind}.")

    weights = _object(manifest, "weights")
    _listed(files, _text(weights, "file", "weights."), "weights.file")
    if manifest["schema"] >= 3 or "unpacked" in weights:
        unpacked = _object(weights, "unpacked", "weights.")
        _check_plain_name(_text(unpacked, "file", "weights.unpacked."))
        most = min(_MOST_FILE_BYTES, MOST_RATIO * files[weights["file"]]["bytes"])
        _whole(unpacked, "bytes", 1, most, "weights.unpacked.")


def _check_end(described: Mapping[str, Any], name: str, where: str) -> None:
    """Check the dtype and shape of one input or output."""
    facts = _object(described, name, where)
    where = f"{where}{name[:80]}."
    if _text(facts, "dtype", where) not in DTYPES:
        raise ConfigError(f"manifest.json: {where}dtype must be one of {', '.join(DTYPES)}")
    shape = _key(facts, "shape", where)
    if not isinstance(shape, list) or not all(isinstance(size, str) or _is_whole(size) for size in shape):
        raise ConfigError(f"manifest.json: {where}shape must be a list of numbers and names")


def _check_model(manifest: Mapping[str, Any]) -> None:
    """Check the facts of a model without a cache."""
    model = _object(manifest, "model")
    if _key(model, "context", "model.") is not None:
        _whole(model, "context", 1, _MOST_CONTEXT, "model.")
        _whole(model, "vocab_size", 1, _MOST_VOCABULARY, "model.")
        if _key(manifest, "tokenizer") is None:
            raise ConfigError("manifest.json: the model has a context of tokens, but no tokenizer")
    if _key(model, "pad_token_id", "model.") is not None:
        _whole(model, "pad_token_id", 0, _MOST_VOCABULARY, "model.")
    labels = _key(model, "labels", "model.")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise ConfigError("manifest.json: model.labels must be a list of texts, or null")
    if _key(model, "pooling", "model.") is not None:
        _text(model, "pooling", "model.")
    if _key(manifest, "cache") is not None:
        raise ConfigError(f"manifest.json: {manifest['task']} keeps no cache, but cache is {_kind(manifest['cache'])}")


def _check_generation(manifest: Mapping[str, Any]) -> None:
    """Check the sizes of a model that generates, one by one and together."""
    model = _object(manifest, "model")
    layers = _whole(model, "layers", 1, _MOST_LAYERS, "model.")
    heads = _whole(model, "kv_heads", 1, _MOST_HEADS, "model.")
    head_dim = _whole(model, "head_dim", 1, _MOST_HEAD_DIM, "model.")
    vocabulary = _whole(model, "vocab_size", 1, _MOST_VOCABULARY, "model.")
    context = _whole(model, "context", 2, _MOST_CONTEXT, "model.")
    if _key(model, "bos_token_id", "model.") is not None:
        _whole(model, "bos_token_id", 0, _MOST_VOCABULARY, "model.")
    ends = _key(model, "eos_token_ids", "model.")
    if not isinstance(ends, list) or not all(_is_whole(end) and 0 <= end < vocabulary for end in ends):
        raise ConfigError(f"manifest.json: model.eos_token_ids must be a list of ids below {vocabulary}")
    # Two bytes is the smallest element a cache here can have; a bundle that needs more than the limit is absurd.
    least = 2 * 2 * layers * heads * head_dim * context
    if least > _MOST_CACHE_BYTES:
        raise ConfigError(
            f"manifest.json: model describes a cache of at least {least} bytes, but {_MOST_CACHE_BYTES} is the most"
        )
    if manifest["task"] == "text2text-generation":
        _whole(model, "source_context", 1, _MOST_CONTEXT, "model.")
        prefix = _key(model, "decoder_prefix_ids", "model.")
        if not isinstance(prefix, list) or not prefix or not all(_is_whole(i) and 0 <= i < vocabulary for i in prefix):
            raise ConfigError(f"manifest.json: model.decoder_prefix_ids must be a list of ids below {vocabulary}")
    cache = _object(manifest, "cache")
    kind = _text(cache, "kind", "cache.")
    if kind not in _CACHE_KINDS:
        raise ConfigError(f"manifest.json: cache.kind must be one of {', '.join(_CACHE_KINDS)}, but is {kind!r}")
    if (kind == "growing") != bool(_object(manifest, "ends")):
        raise ConfigError("manifest.json: ends must describe a decoder whose cache grows, and no other")
    _whole(cache, "bytes", 0, _MOST_CACHE_BYTES, "cache.")
    if _text(cache, "dtype", "cache.") not in _CACHE_DTYPES:
        raise ConfigError(f"manifest.json: cache.dtype must be one of {', '.join(_CACHE_DTYPES)}")


def _check_tokenizer(manifest: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Check the tokenizer's and the chat template's files, and the special tokens."""
    if _key(manifest, "tokenizer") is None and manifest["task"] not in GENERATION:
        return
    tokenizer = _object(manifest, "tokenizer")
    name = _text(tokenizer, "file", "tokenizer.")
    _listed(files, name, "tokenizer.file", _MOST_TOKENIZER_BYTES)
    if _key(tokenizer, "chat_template", "tokenizer.") is not None:
        template = _text(tokenizer, "chat_template", "tokenizer.")
        _listed(files, template, "tokenizer.chat_template", _MOST_TEMPLATE_BYTES)
    special = _object(tokenizer, "special_tokens", "tokenizer.")
    for role in special:
        if special[role] is not None:
            _text(special, role, "tokenizer.special_tokens.")


def _check_plain_name(name: str) -> None:
    """Raise ConfigError unless name is relative, stays below the bundle and means the same on every system."""
    parts = name.split("/")
    odd = any(part in ("", ".", "..") or len(part) > _MOST_PART for part in parts)
    if odd or len(name) > _MOST_NAME or _NOT_PLAIN.search(name):
        raise ConfigError(
            "manifest.json: a file must be named by a plain path inside the bundle, "
            f"but one is {name[:_MOST_NAME]!r}: do not use it"
        )


def _listed(files: Mapping[str, Any], name: str, where: str, most_bytes: int = _MOST_FILE_BYTES) -> None:
    """Raise ConfigError unless `name` is one of `files` and small enough."""
    if name not in files:
        raise ConfigError(f"manifest.json: {where} is {name!r}, which files does not list")
    if files[name]["bytes"] > most_bytes:
        raise ConfigError(f"manifest.json: {where} may have {most_bytes} bytes at most, but has {files[name]['bytes']}")


def _inside(path: Path, name: str) -> Path:
    """Return the regular file `name` of bundle `path`; raise when it is missing or reached through a link."""
    _check_plain_name(name)
    file = path
    try:
        for part in name.split("/"):
            file = file / part
            if file.is_symlink():
                raise ConfigError(f"a bundle may hold no links, but {name} is or passes through one: do not use it")
        if not file.is_file():
            raise ContractError(f"the bundle should hold {name} but does not: copy or build it again")
    except OSError as error:  # a folder that may not be read, a disk that fails
        raise ContractError(f"{name} of the bundle can't be read: {error.strerror or error}") from None
    return file


def _read_text(file: Path) -> str:
    """Return the UTF-8 text of file; raise ConfigError when it is something else."""
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise ContractError(f"{file.name} of the bundle can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.name} must be UTF-8 text, but is not: {error}") from None


def _key(holder: Mapping[str, Any], name: str, where: str = "") -> Any:
    """Return holder[name]; raise ConfigError when it is missing."""
    if name not in holder:
        raise ConfigError(f"manifest.json: {where}{name} is missing: the bundle is damaged, copy or build it again")
    return holder[name]


def _object(holder: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """Return holder[name], a JSON object."""
    value = _key(holder, name, where)
    if not isinstance(value, dict):
        raise ConfigError(f"manifest.json: {where}{name} must be an object, but is {_kind(value)}")
    return value


def _text(holder: Mapping[str, Any], name: str, where: str = "") -> str:
    """Return holder[name], a JSON string."""
    value = _key(holder, name, where)
    if not isinstance(value, str):
        raise ConfigError(f"manifest.json: {where}{name} must be a text, but is {_kind(value)}")
    return value


def _whole(holder: Mapping[str, Any], name: str, least: int, most: int, where: str = "") -> int:
    """Return holder[name], a whole number in [least, most]."""
    value = _key(holder, name, where)
    if not _is_whole(value):
        raise ConfigError(f"manifest.json: {where}{name} must be a whole number, but is {_kind(value)}")
    if not least <= value <= most:
        raise ConfigError(f"manifest.json: {where}{name} must be from {least} to {most}, but is {value}")
    return int(value)


def _is_whole(value: object) -> bool:
    """Tell whether value is a JSON integer (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """Name a JSON type in a user's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
