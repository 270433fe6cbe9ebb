"""Bundles: what is wrong with a directory or a manifest is said in one sentence, and nothing outside is read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime import load
from edgepipe.runtime.bundle import read_bundle, read_manifest, verify_hashes

CONTENT = {
    "decoder.onnx": b"graph",
    "weights.bin": b"weights!",
    "tokenizer.json": b"{}",
    "chat_template.jinja": "{{ 'é' }}".encode(),
    "licences/LICENSE": b"Apache-2.0",
}


def _manifest() -> dict[str, Any]:
    return {
        "schema": 1,
        "edgepipe": "0.1.0",
        "name": "tiny",
        "task": "text-generation",
        "engine": "onnxruntime",
        "graphs": {"decoder": "decoder.onnx"},
        "weights": {"file": "weights.bin", "bytes": 8, "parameters": 16, "bits_per_weight": 4.0, "parts": []},
        "model": {
            "layers": 2,
            "kv_heads": 1,
            "head_dim": 8,
            "vocab_size": 300,
            "context": 64,
            "bos_token_id": None,
            "eos_token_ids": [2],
        },
        "cache": {"bytes": 8192, "dtype": "float32", "shape": [2, 1, 64, 8]},
        "tokenizer": {
            "file": "tokenizer.json",
            "chat_template": "chat_template.jinja",
            "special_tokens": {"bos_token": None, "eos_token": "</s>", "unk_token": None, "pad_token": None},
        },
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in CONTENT.items()
        },
        "licence": {"id": "Apache-2.0"},
        "source": {},
        "recipe": {},
        "history": [],
    }


def _write(path: Path, manifest: Any) -> Path:
    for name, content in CONTENT.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_good_bundle_is_read(tmp_path: Path) -> None:
    """Give the manifest, the tokenizer's path and the template's text; hashes fit."""
    bundle = read_bundle(_write(tmp_path, _manifest()))
    assert bundle.manifest["name"] == "tiny"
    assert bundle.tokenizer == tmp_path / "tokenizer.json"
    assert bundle.chat_template == "{{ 'é' }}"
    verify_hashes(tmp_path, bundle.manifest)


def test_bundle_without_template_is_read(tmp_path: Path) -> None:
    """Take null for a model that has no chat."""
    manifest = _manifest()
    manifest["tokenizer"]["chat_template"] = None
    assert read_bundle(_write(tmp_path, manifest)).chat_template is None


def test_changed_byte_is_found_by_hash_only(tmp_path: Path) -> None:
    """Let loading compare sizes, and verify_hashes every byte."""
    path = _write(tmp_path, _manifest())
    (path / "weights.bin").write_bytes(b"weights?")
    bundle = read_bundle(path)
    with pytest.raises(ContractError, match=r"weights\.bin should have sha256"):
        verify_hashes(path, bundle.manifest)


def test_other_size_is_found_at_reading(tmp_path: Path) -> None:
    """Name the file and both sizes."""
    path = _write(tmp_path, _manifest())
    (path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ContractError, match=r"weights\.bin should have 8 bytes but has 5"):
        read_bundle(path)


def test_missing_file_is_found_at_reading(tmp_path: Path) -> None:
    """Name the file."""
    path = _write(tmp_path, _manifest())
    (path / "decoder.onnx").unlink()
    with pytest.raises(ContractError, match=r"should hold decoder\.onnx"):
        read_bundle(path)


@pytest.mark.parametrize("what", ["nothing", "file", "empty directory"])
def test_path_that_is_no_bundle_is_refused(tmp_path: Path, what: str) -> None:
    """Say what was found instead of a bundle."""
    path = tmp_path / "here"
    if what == "file":
        path.write_text("x")
    if what == "empty directory":
        path.mkdir()
    words = {"nothing": "does not exist", "file": "not a directory", "empty directory": "no manifest.json"}[what]
    with pytest.raises(ConfigError, match=words):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"schema": NaN}', "\xff", "[" * 100_000])
def test_text_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    """Refuse broken JSON, other JSON, and nesting that would exhaust the stack."""
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_huge_manifest_is_refused(tmp_path: Path) -> None:
    """Read no more than a manifest can have."""
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 30)  # a hole: takes no disk
    with pytest.raises(ConfigError, match="at most"):
        read_manifest(tmp_path)


def test_newer_schema_is_refused_before_anything_else(tmp_path: Path) -> None:
    """Tell to update edgepipe, whatever else the newer manifest holds."""
    (tmp_path / "manifest.json").write_text('{"schema": 4}')
    with pytest.raises(ConfigError, match="schema 4, but this edgepipe reads up to 3: update edgepipe"):
        read_manifest(tmp_path)


REQUIRED = [
    "schema",
    "name",
    "task",
    "engine",
    "graphs",
    "graphs.decoder",
    "weights",
    "weights.file",
    "model",
    "model.layers",
    "model.kv_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.context",
    "model.eos_token_ids",
    "cache",
    "cache.bytes",
    "tokenizer",
    "tokenizer.file",
    "tokenizer.special_tokens",
    "files",
]


def _holder(manifest: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    *parents, last = where.split(".")
    holder = manifest
    for parent in parents:
        holder = holder[parent]
    return holder, last


@pytest.mark.parametrize("where", REQUIRED)
def test_missing_key_is_named(tmp_path: Path, where: str) -> None:
    """Name the key that is missing."""
    manifest = _manifest()
    holder, last = _holder(manifest, where)
    del holder[last]
    with pytest.raises(ConfigError, match=last):
        read_bundle(_write(tmp_path, manifest))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (where, value)
        for where in REQUIRED
        for value in (True, 1.5, ["x"], "12")
        if not (value == "12" and where in ("name", "task", "engine"))  # a text is right there
    ],
)
def test_other_types_are_refused(tmp_path: Path, where: str, value: Any) -> None:
    """Refuse every other JSON type by name; a text that names no file counts too."""
    manifest = _manifest()
    holder, last = _holder(manifest, where)
    holder[last] = value
    with pytest.raises(ConfigError, match=last):
        read_bundle(_write(tmp_path, manifest))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("schema", 0),
        ("model.layers", 0),
        ("model.layers", 10**9),
        ("model.head_dim", -8),
        ("model.vocab_size", 10**30),
        ("model.context", 1),
        ("model.context", 1 << 40),
        ("model.eos_token_ids", [300]),
        ("model.eos_token_ids", [-1]),
        ("model.bos_token_id", "x"),
        ("cache.bytes", 1 << 60),
    ],
)
def test_absurd_sizes_are_refused(tmp_path: Path, where: str, value: Any) -> None:
    """Refuse numbers that no model has, before anything is allocated by them."""
    manifest = _manifest()
    holder, last = _holder(manifest, where)
    holder[last] = value
    with pytest.raises(ConfigError, match=last):
        read_bundle(_write(tmp_path, manifest))


def test_absurd_product_is_refused(tmp_path: Path) -> None:
    """Refuse sizes that are plain one by one and absurd together."""
    manifest = _manifest()
    manifest["model"].update(layers=4000, kv_heads=4000, head_dim=60000, context=1 << 26)
    with pytest.raises(ConfigError, match="cache of at least"):
        read_bundle(_write(tmp_path, manifest))


@pytest.mark.parametrize(
    ("name", "bytes_"), [("tokenizer.json", 1 << 33), ("chat_template.jinja", 1 << 24), ("weights.bin", 1 << 50)]
)
def test_oversized_files_are_refused_unread(tmp_path: Path, name: str, bytes_: int) -> None:
    """Refuse a stated size beyond what such a file can have."""
    manifest = _manifest()
    manifest["files"][name]["bytes"] = bytes_
    with pytest.raises(ConfigError, match="bytes"):
        read_bundle(_write(tmp_path, manifest))


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/hostname", "../weights.bin", "a/../../weights.bin", "./weights.bin", "", "a//b", "C:x", "a\\b", "a\0b"),
        *("\ud800", "x" * 64, "/".join("x" * 200)),  # no UTF-8; longer than file systems take
    ],
)
def test_names_that_leave_the_bundle_are_refused(tmp_path: Path, name: str) -> None:
    """Take plain relative names only, wherever they stand."""
    path = tmp_path / "bundle"
    path.mkdir()
    (tmp_path / "weights.bin").write_bytes(CONTENT["weights.bin"])
    manifest = _manifest()
    manifest["files"][name] = copy.deepcopy(manifest["files"]["weights.bin"])
    manifest["weights"]["file"] = name
    with pytest.raises(ConfigError, match="plain path inside the bundle"):
        read_bundle(_write(path, manifest))


@pytest.mark.parametrize("where", ["graphs.decoder", "weights.file", "tokenizer.file", "tokenizer.chat_template"])
def test_files_that_are_not_listed_are_refused(tmp_path: Path, where: str) -> None:
    """Open no file whose size and hash the manifest does not state."""
    manifest = _manifest()
    holder, last = _holder(manifest, where)
    (tmp_path / "extra.bin").write_bytes(b"x")
    holder[last] = "extra.bin"
    with pytest.raises(ConfigError, match=r"extra\.bin.*does not list"):
        read_bundle(_write(tmp_path, manifest))


def _link_file(path: Path, outside: Path) -> None:
    (path / "weights.bin").unlink()
    (path / "weights.bin").symlink_to(outside / "weights.bin")


def _link_directory(path: Path, outside: Path) -> None:
    (path / "licences" / "LICENSE").rename(outside / "LICENSE")
    (path / "licences").rmdir()
    (path / "licences").symlink_to(outside)


@pytest.mark.parametrize("link", [_link_file, _link_directory])
def test_links_are_refused(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """Follow no link out of the bundle, neither a file's nor a directory's; hashing neither."""
    path, outside = tmp_path / "bundle", tmp_path / "outside"
    path.mkdir()
    outside.mkdir()
    (outside / "weights.bin").write_bytes(CONTENT["weights.bin"])
    manifest = _manifest()
    link(_write(path, manifest), outside)
    with pytest.raises(ConfigError, match="link"):
        read_bundle(path)
    with pytest.raises(ConfigError, match="link"):
        verify_hashes(path, manifest)


def test_a_manifest_behind_a_link_is_refused(tmp_path: Path) -> None:
    """Follow no link to the manifest either."""
    path = tmp_path / "bundle"
    path.mkdir()
    (_write(path, _manifest()) / "manifest.json").rename(tmp_path / "elsewhere.json")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConfigError, match="no links"):
        read_manifest(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
@pytest.mark.parametrize("name", ["manifest.json", "weights.bin"])
def test_a_pipe_is_refused_unopened(tmp_path: Path, name: str) -> None:
    """Wait for no writer: a pipe is no regular file."""
    path = _write(tmp_path, _manifest())
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises((ConfigError, ContractError), match=name):
        read_bundle(path)


def test_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """Take regular files only."""
    path = _write(tmp_path, _manifest())
    (path / "weights.bin").unlink()
    (path / "weights.bin").mkdir()
    with pytest.raises(ContractError, match=r"weights\.bin"):
        read_bundle(path)


@pytest.mark.parametrize("chosen", [{"threads": 0}, {"threads": True}, {"callers": 0}, {"callers": 1.5}], ids=str)
def test_wrong_load_options_are_refused(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Name the option before the bundle is opened."""
    with pytest.raises(ConfigError, match=next(iter(chosen))):
        load(tmp_path, **chosen)
