"""Bill of materials: valid CycloneDX, the model with licence and lineage, every file, every package; no time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import edgepipe
from edgepipe.artifacts import Json, Licence, ModelInfo
from edgepipe.sbom import bill_of_materials
from edgepipe.store import versions

INFO = ModelInfo(
    name="small",
    task="text-generation",
    config={},
    tokenizer={},
    chat_template=None,
    eos_token_ids=(1,),
    bos_token_id=None,
    licence=Licence(id="Apache-2.0", source="org/small-instruct", lineage=("org/small", "lab/älter", "org/small")),
    fingerprint="ab" * 32,
)
FILES = {"decoder.onnx": {"bytes": 3, "sha256": "0" * 64}, "weights.bin": {"bytes": 5, "sha256": "1" * 64}}


def assert_valid(bill: Json) -> None:
    """Hold a bill against the schema that CycloneDX publishes."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None


def test_the_bill_of_a_bundle(tiny_bundle: Path, manifest_of: Callable[[Path], dict[str, Any]]) -> None:
    bill = json.loads((tiny_bundle / "sbom.cdx.json").read_text(encoding="utf-8"))
    manifest = manifest_of(tiny_bundle)
    assert_valid(bill)
    files = {c["name"]: c["hashes"] for c in bill["components"] if c["type"] == "file"}
    assert files == {
        name: [{"alg": "SHA-256", "content": facts["sha256"]}]
        for name, facts in manifest["files"].items()
        if name != "sbom.cdx.json"
    }
    packages = {c["name"]: c["version"] for c in bill["components"] if c["type"] == "library"}
    assert packages == manifest["versions"] | {"edgepipe": manifest["edgepipe"]}
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "tiny-llama")
    assert model["licenses"] == [{"license": {"name": "unknown"}}]


def test_licence_and_lineage() -> None:
    bill = bill_of_materials(INFO, FILES, {"torch": "2.13.0+cpu"})
    assert_valid(bill)
    model = bill["metadata"]["component"]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    ancestors = [(a["type"], a["name"]) for a in model["pedigree"]["ancestors"]]
    assert sorted(ancestors) == [
        ("machine-learning-model", name) for name in ("lab/älter", "org/small", "org/small-instruct")
    ]
    assert model["pedigree"]["notes"] == "nearest first: org/small-instruct, org/small, lab/älter"
    assert {p["name"]: p["value"] for p in model["properties"]} == {
        "edgepipe:task": "text-generation",
        "edgepipe:source": "org/small-instruct",
        "edgepipe:source-sha256": "ab" * 32,
    }
    (depends,) = [d["dependsOn"] for d in bill["dependencies"] if d["ref"] == "model"]
    assert depends == ["file:decoder.onnx", "file:weights.bin"]
    (torch,) = [c for c in bill["components"] if c["name"] == "torch"]
    assert (torch["purl"], torch["scope"]) == ("pkg:pypi/torch@2.13.0%2Bcpu", "excluded")


@pytest.mark.parametrize("licence", ["unknown", "MIT OR Apache-2.0", "Llama 3.2 Community", "gemma"])
def test_any_licence_makes_a_valid_bill(licence: str) -> None:
    """SPDX ids and expressions are told from names."""
    info = dataclasses.replace(INFO, licence=Licence(id=licence, source="x"))
    bill = bill_of_materials(info, FILES, {})
    assert_valid(bill)
    assert licence in json.dumps(bill["metadata"]["component"]["licenses"])


def test_the_serial_follows_from_the_contents() -> None:
    bill = bill_of_materials(INFO, FILES, versions())
    assert bill == bill_of_materials(INFO, dict(reversed(FILES.items())), versions())
    assert "timestamp" not in bill["metadata"]
    other = {**FILES, "weights.bin": {"bytes": 5, "sha256": "2" * 64}}
    serials = {bill_of_materials(INFO, files, versions())["serialNumber"] for files in (FILES, other)}
    assert len(serials) == 2 and bill["serialNumber"] in serials
    (package,) = [c for c in bill["components"] if c["name"] == "edgepipe"]
    assert package["version"] == edgepipe.__version__
