"""Verify: hold a bundle against its own manifest and against the contract (docs/bundle.md), one check after the other.

A check that fails doesn't end the others; only those that would build on it are left out, so that nothing damaged
reaches a parser that trusts it: the tokenizer and the graph are opened when every hash fits. Needs the base install.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.errors import ContractError, EdgepipeError
from edgepipe.runtime.bundle import GENERATION, MANIFEST, read_bundle, read_manifest, verify_hashes
from edgepipe.runtime.exits import has_exits

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "uint16": 2, "int8": 1}  # of a key or value
_MOST_PARAMETERS = 1 << 50
_BILL = "sbom.cdx.json"
_MOST_BILL_BYTES = 16 << 20
_MOST_CHARACTERS = 600  # of a sentence: some quote what they found
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """Name one check, what it calls, and the checks that must have passed before."""

    name: str
    run: Callable[[Path, Json], None]  # raises EdgepipeError
    after: tuple[str, ...] = ("manifest",)


def verify_bundle(path: str | Path) -> Json:
    """Check the bundle in directory `path`; return `{"bundle": …, "checks": [{"name": …, "ok": …}, …]}`.

    `ok` is true, false, or null for a check that was left out because an earlier one failed; a failed check has a
    `problem` too, one sentence. Reads every byte. Raises ConfigError when `path` is no directory.
    """
    path = Path(path)
    if not path.is_dir():
        read_manifest(path)  # says what is there instead
    manifest: Json = {}

    def read(path: Path, _: Json) -> None:
        manifest.update(read_manifest(path))

    found: dict[str, Json] = {}
    for check in (_Check(name="manifest", run=read, after=()), *_CHECKS):
        outcome: Json = {"name": check.name, "ok": None}
        if all(found[name]["ok"] for name in check.after):
            problem = _problem(check, path, manifest)
            outcome["ok"] = problem is None
            if problem is not None:
                outcome["problem"] = problem
        found[check.name] = outcome
    return {"bundle": _printable(str(path)), "checks": list(found.values())}


def _problem(check: _Check, path: Path, manifest: Json) -> str | None:
    """Return what is wrong as one line, or None."""
    try:
        check.run(path, manifest)
    except EdgepipeError as error:
        return _printable(str(error))
    except OSError as error:
        return _printable(f"{error.filename or path} can't be read: {error.strerror or error}")
    return None


def _printable(text: str) -> str:
    """Return text on one line, without what would steer a terminal or has no UTF-8, and not endless."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"


# ---------------------------------------------------------------------------------------------------------------------
# the checks


def _files(path: Path, _: Json) -> None:
    """Look for every file: regular, of the stated size; the template must be text."""
    read_bundle(path)


def _nothing_else(path: Path, manifest: Json) -> None:
    """Refuse files, folders and links that the manifest doesn't list."""
    listed = {MANIFEST, *manifest["files"]}
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    waiting = [path]
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink():
                raise ContractError(f"a bundle may hold no links, but {name} is one: take it out")
            if entry.is_dir() and name in folders:
                waiting.append(entry)
            elif name not in listed:
                raise ContractError(f"the bundle holds {name}, which the manifest doesn't list: take it out")


def _sizes(_: Path, manifest: Json) -> None:
    """Compare what the manifest says twice, or lets one compute."""
    if manifest["task"] in GENERATION:
        _cache_sizes(manifest["model"], manifest["cache"])
    _weight_sizes(manifest)


def _cache_sizes(model: Json, cache: Json) -> None:
    """Compare the sizes of a model that generates with those of its cache."""
    for name in ("heads", "hidden_size"):
        _whole(model, name, "model.")
    if model["heads"] % model["kv_heads"]:
        raise ContractError(
            f"manifest.json: model.heads should be a multiple of the {model['kv_heads']} kv_heads, "
            f"but is {model['heads']}: build the bundle again"
        )
    if model["bos_token_id"] is not None and model["bos_token_id"] >= model["vocab_size"]:
        raise ContractError(
            f"manifest.json: model.bos_token_id should be an id below {model['vocab_size']}, "
            f"but is {model['bos_token_id']}: build the bundle again"
        )
    shape = [1, model["kv_heads"], model["context"], model["head_dim"]]
    _same("cache.shape", cache.get("shape"), shape)
    _same("cache.layers", cache.get("layers"), model["layers"])
    _same("cache.bytes", cache["bytes"], 2 * model["layers"] * _ELEMENT_BYTES[cache["dtype"]] * math.prod(shape))


def _weight_sizes(manifest: Json) -> None:
    """Compare what the manifest says of the weights with their file, and their parts with the sum."""
    weights = manifest["weights"]
    nbytes = manifest["files"][weights["file"]]["bytes"]
    _same("weights.bytes", weights.get("bytes"), nbytes)
    parameters = _whole(weights, "parameters", "weights.")
    _same("weights.bits_per_weight", weights.get("bits_per_weight"), round(8 * nbytes / parameters, 4))
    parts = weights.get("parts")
    if not isinstance(parts, list) or not all(isinstance(row, dict) for row in parts):
        raise ContractError("manifest.json: weights.parts should be a list of objects: build the bundle again")
    for row in parts:
        size, stored = _whole(row, "parameters", "weights.parts."), _whole(row, "bytes", "weights.parts.")
        for name in ("part", "storage"):
            _text(row, name, "weights.parts.")
        _same("weights.parts.bits_per_weight", row.get("bits_per_weight"), 8 * stored / size)
    _same("the sum of weights.parts.parameters", sum(row["parameters"] for row in parts), parameters)
    whole = weights["unpacked"]["bytes"] if "unpacked" in weights else nbytes
    if (stored := sum(row["bytes"] for row in parts)) > whole:
        raise ContractError(
            f"manifest.json: weights.parts should have {whole} bytes at most, but have {stored}: build it again"
        )


def _licence(_: Path, manifest: Json) -> None:
    """Look for the licence, the model's source and its lineage, which is empty for a model made from no other."""
    licence = _object(manifest, "licence")
    _text(licence, "id", "licence.")
    _same("source.model", _object(manifest, "source").get("model"), _text(licence, "source", "licence."))
    lineage = licence.get("lineage")
    if not isinstance(lineage, list) or not all(isinstance(name, str) and name.strip() for name in lineage):
        raise ContractError("manifest.json: licence.lineage should be a list of names: build the bundle again")


def _bill(path: Path, manifest: Json) -> None:
    """Open the bill of materials, which must name the model, licence, lineage and files that the manifest names."""
    if _BILL not in manifest["files"]:
        raise ContractError(f"the bundle should list {_BILL} but does not: build it again")
    if manifest["files"][_BILL]["bytes"] > _MOST_BILL_BYTES:
        raise ContractError(f"{_BILL} may have {_MOST_BILL_BYTES} bytes at most, but has more: build the bundle again")
    try:
        bill = json.loads((path / _BILL).read_bytes())
        kind = (bill["bomFormat"], bill["specVersion"])
        model = bill["metadata"]["component"]
        licences = [entry.get("expression") or _either(entry["license"], "id", "name") for entry in model["licenses"]]
        ancestors = sorted(ancestor["name"] for ancestor in model["pedigree"]["ancestors"])
        files = {c["name"]: c["hashes"][0]["content"] for c in bill["components"] if c["type"] == "file"}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, StopIteration):
        raise ContractError(f"{_BILL} is no CycloneDX bill of a model: build the bundle again") from None
    licence = manifest["licence"]
    for what, found, expected in (
        ("format", kind, ("CycloneDX", "1.6")),
        ("model", (model.get("type"), model["name"]), ("machine-learning-model", manifest["name"])),
        ("licence", licences, [licence["id"]]),
        ("lineage", ancestors, sorted({licence["source"], *licence["lineage"]})),
        ("files", files, {n: facts["sha256"] for n, facts in manifest["files"].items() if n != _BILL}),
    ):
        if found != expected:
            raise ContractError(f"{_BILL}: {what} should be {expected}, but is {found}: build the bundle again")


def _either(holder: Json, *names: str) -> Any:
    """Return the first of the keys that is there."""
    return next(holder[name] for name in names if name in holder)


def _origin(_: Path, manifest: Json) -> None:
    """Look for what the bundle was made from and with: the source's hash, recipe, history and versions."""
    if not _SHA256.fullmatch(_text(_object(manifest, "source"), "sha256", "source.")):
        raise ContractError("manifest.json: source.sha256 should be 64 hex digits: build the bundle again")
    recipe = _object(manifest, "recipe")
    _text(recipe, "target", "recipe.")
    _object(recipe, "options", "recipe.")
    if not isinstance(recipe.get("stages"), list) or not isinstance(recipe.get("seed"), int):
        raise ContractError("manifest.json: recipe should have a list of stages and a seed: build the bundle again")
    history = manifest.get("history")
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise ContractError("manifest.json: history should be a list of objects: build the bundle again")
    for record in history:
        _text(record, "stage", "history.")
        if not _SHA256.fullmatch(_text(record, "key", "history.")):
            raise ContractError("manifest.json: history.key should be 64 hex digits: build the bundle again")
    for name in _object(manifest, "versions"):
        _text(manifest["versions"], name, "versions.")


def _tokenizer(path: Path, manifest: Json) -> None:
    """Open the tokenizer, which may have no id beyond the logits, and compile the chat template."""
    from edgepipe.runtime.chat import ChatTemplate
    from edgepipe.runtime.tokenizer import Tokenizer

    bundle = read_bundle(path)
    if bundle.tokenizer is None:
        return
    largest, vocabulary = Tokenizer(bundle.tokenizer).largest_id, manifest["model"]["vocab_size"]
    if largest >= vocabulary:
        raise ContractError(
            f"{bundle.tokenizer.name} should have ids below the {vocabulary} logits, but has {largest}: "
            "build the bundle again"
        )
    if bundle.chat_template is not None:
        ChatTemplate(bundle.chat_template, manifest["tokenizer"]["special_tokens"])


def _graph(path: Path, manifest: Json) -> None:
    """Load the graphs in their engine; inputs and outputs must be those of the contract."""
    from edgepipe.runtime import open_graphs

    opened = open_graphs(read_bundle(path), 1)
    reader = getattr(opened, "reader", None)
    if reader is not None and "scorer" in manifest["graphs"]:
        reader.scorer()  # opened only when it is used
    if has_exits(manifest):  # the graph of all layers, for readers that know of no parts
        open_graphs(read_bundle(path), 1, in_parts=False)


_CHECKS = (
    _Check(name="files", run=_files),
    _Check(name="hashes", run=lambda path, manifest: verify_hashes(path, manifest), after=("manifest", "files")),
    _Check(name="nothing else", run=_nothing_else),
    _Check(name="sizes", run=_sizes),
    _Check(name="licence", run=_licence),
    _Check(name="origin", run=_origin),
    _Check(name="bill", run=_bill, after=("manifest", "files", "hashes", "licence")),
    _Check(name="tokenizer", run=_tokenizer, after=("manifest", "files", "hashes")),
    _Check(name="graph", run=_graph, after=("manifest", "files", "hashes", "sizes")),
)


# ---------------------------------------------------------------------------------------------------------------------
# what a manifest holds, where the runtime doesn't depend on it


def _same(where: str, found: Any, expected: Any) -> None:
    """Raise ContractError when a value isn't the one that follows from the others."""
    if found != expected or isinstance(found, bool):
        raise ContractError(f"manifest.json: {where} should be {expected}, but is {found!r}: build the bundle again")


def _object(holder: Json, name: str, where: str = "") -> Json:
    """Return holder[name], an object."""
    value = holder.get(name)
    if not isinstance(value, dict) or not value:
        raise ContractError(f"manifest.json: {where}{name} should be an object that isn't empty: build it again")
    return value


def _text(holder: Json, name: str, where: str) -> str:
    """Return holder[name], a text that isn't blank."""
    value = holder.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ContractError(f"manifest.json: {where}{name} should be a text that isn't empty: build the bundle again")
    return value


def _whole(holder: Json, name: str, where: str) -> int:
    """Return holder[name], a whole number that counts something."""
    value = holder.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_PARAMETERS:
        raise ContractError(f"manifest.json: {where}{name} should be a whole number from 1: build the bundle again")
    return value
