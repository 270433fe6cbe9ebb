"""Inspect: what it says about a model and a bundle is what lies in the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from edgepipe.errors import ConfigError, ContractError
from edgepipe.inspect import inspect_any, inspect_bundle, inspect_model
from tests.tiny_models import save_tiny_model

EMBEDDING = "embedding and head"


def parts_of(facts: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the parts by their name and storage."""
    return {(part["part"], part["storage"]): part for part in facts["parts"]}


def test_a_model_is_what_its_files_hold(tiny_model_dir: Path) -> None:
    facts = inspect_any(str(tiny_model_dir))
    tensors = load_file(tiny_model_dir / "model.safetensors")
    assert facts["kind"] == "model"
    assert (facts["name"], facts["task"], facts["model_type"]) == ("tiny-llama", "text-generation", "llama")
    assert facts["layers"] == 2
    assert facts["parameters"] == sum(t.size for t in tensors.values())
    assert facts["weight_bytes"] == sum(t.nbytes for t in tensors.values())
    assert facts["bits_per_weight"] == 32
    parts = parts_of(facts)
    assert set(parts) == {(part, "float32") for part in (EMBEDDING, "attention", "mlp", "norms and rest")}
    mlp = [t for name, t in tensors.items() if ".mlp." in name]
    assert parts["mlp", "float32"]["parameters"] == sum(t.size for t in mlp) == 2 * 3 * 112 * 100
    assert parts["norms and rest", "float32"]["parameters"] == 5 * 112
    for key in ("parameters", "bytes"):
        total = facts["parameters" if key == "parameters" else "weight_bytes"]
        assert sum(part[key] for part in facts["parts"]) == total


def test_a_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    untied = inspect_model(str(save_tiny_model(tmp_path / "untied", "llama", tie_word_embeddings=False)))
    tied = inspect_model(str(save_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)))
    assert untied["parameters"] - tied["parameters"] == 384 * 112
    assert parts_of(tied)[EMBEDDING, "float32"]["parameters"] == 384 * 112
    assert parts_of(untied)[EMBEDDING, "float32"]["parameters"] == 2 * 384 * 112


def test_a_bundle_is_what_its_manifest_says(tiny_bundle: Path, manifest_of: Callable[[Path], dict[str, Any]]) -> None:
    facts, manifest = inspect_any(str(tiny_bundle)), manifest_of(tiny_bundle)
    assert facts["kind"] == "bundle"
    assert (facts["name"], facts["task"], facts["engine"]) == ("tiny-llama", "text-generation", "onnxruntime")
    assert (facts["layers"], facts["context"]) == (2, 128)
    assert facts["weight_bytes"] == (tiny_bundle / "weights.bin").stat().st_size
    files = [p for p in tiny_bundle.iterdir() if p.name != "manifest.json"]
    assert facts["bundle_bytes"] == sum(p.stat().st_size for p in files)
    assert facts["bits_per_weight"] == pytest.approx(8 * facts["weight_bytes"] / facts["parameters"], abs=1e-3)
    assert facts["cache_bytes"] == manifest["cache"]["bytes"] == 2 * 2 * 2 * 7 * 128 * 16
    assert facts["licence"] == manifest["licence"]["id"]


def test_a_bundle_keeps_four_and_eight_bits(tiny_bundle: Path) -> None:
    """The layers at 4 bits and a float16 scale per 32, embedding and head at 8; norms stay floats."""
    parts = parts_of(inspect_bundle(tiny_bundle))
    assert set(parts) == {
        (EMBEDDING, "q8 rtn"),
        ("attention", "q4 rtn"),
        ("mlp", "q4 rtn"),
        ("norms and rest", "float32"),
    }
    assert 4.5 <= parts["attention", "q4 rtn"]["bits_per_weight"] < 5.5  # 112 wide: padded to 128
    assert 8.5 <= parts[EMBEDDING, "q8 rtn"]["bits_per_weight"] < 10
    for part in parts.values():
        assert part["bits_per_weight"] == pytest.approx(8 * part["bytes"] / part["parameters"])


def test_a_directory_with_a_manifest_is_a_bundle(tiny_model_dir: Path, tmp_path: Path) -> None:
    """And what is wrong with it is said, rather than taking it for a model."""
    both = Path(shutil.copytree(tiny_model_dir, tmp_path / "both"))
    (both / "manifest.json").write_text(json.dumps({"schema": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        inspect_any(str(both))


def test_a_damaged_bundle_is_not_described(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / "decoder.onnx").unlink()
    with pytest.raises(ContractError, match=r"decoder\.onnx"):
        inspect_any(str(broken))


def test_what_is_nowhere() -> None:
    with pytest.raises(ConfigError, match="'no/such/model' was found nowhere"):
        inspect_any("no/such/model")


@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_of_a_bundle_sum_to_its_file(
    tiny_model_dir: Path, build_tiny: Callable[..., Path], symmetric: bool
) -> None:
    """Zero points count as the file packs them; what is missing to the whole are gaps before aligned tensors."""
    bundle = build_tiny(tiny_model_dir, ("quantize", "symmetric", symmetric))
    facts = inspect_bundle(bundle)
    total = sum(part["bytes"] for part in facts["parts"])
    assert total <= facts["weight_bytes"] <= total + 64 * 60
    assert sum(part["parameters"] for part in facts["parts"]) == facts["parameters"]
