"""Verify: a bundle that was just built passes, and each check names what it is there for."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime import load
from edgepipe.verify import verify_bundle
from tests.runtime.damages import own_up, read, write, write_hash

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["manifest", "files", "hashes", "nothing else", "sizes", "licence", "origin", "bill", "tokenizer", "graph"]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Copy the tiny bundle to where it can be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def failed(bundle: Path) -> dict[str, str]:
    """Return the failed checks and their problems."""
    return {check["name"]: check["problem"] for check in verify_bundle(bundle)["checks"] if check["ok"] is False}


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and let it state the sizes and hashes of the files as they are."""
    own_up(bundle)
    manifest = read(bundle)
    change(manifest)
    write(bundle, manifest)


def test_a_good_bundle(bundle: Path) -> None:
    assert verify_bundle(bundle) == {"bundle": str(bundle), "checks": [{"name": n, "ok": True} for n in NAMES]}


def test_the_command_says_a_line_per_check_and_one_json_document(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(bundle)])
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stderr.splitlines()] == NAMES
    assert json.loads(result.stdout) == verify_bundle(bundle)


def test_the_command_ends_with_the_first_failure(bundle: Path) -> None:
    """And what builds on the failed check isn't done: the damaged graph never gets to the engine."""
    graph = bytearray((bundle / "decoder.onnx").read_bytes())
    graph[100] ^= 1
    (bundle / "decoder.onnx").write_bytes(graph)
    (bundle / "notes.txt").write_text("x", encoding="utf-8")
    result = CliRunner().invoke(main, ["verify", str(bundle)])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("edgepipe: hashes: decoder.onnx should have sha256")
    assert "graph            not checked" in result.stderr
    checks = {check["name"]: check["ok"] for check in json.loads(result.stdout)["checks"]}
    assert checks == {
        **dict.fromkeys(NAMES, True),
        **{"hashes": False, "nothing else": False, "bill": None, "tokenizer": None, "graph": None},
    }


def test_what_is_no_directory_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        verify_bundle(tmp_path / "nowhere")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "nowhere")]).exit_code == 2


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    checks = verify_bundle(tmp_path)["checks"]
    assert "has no manifest.json" in checks[0]["problem"]
    assert [check["ok"] for check in checks[1:]] == [None] * (len(NAMES) - 1)


@pytest.mark.parametrize("what", ["file", "folder", "link", "hidden"])
def test_what_is_not_listed(bundle: Path, what: str) -> None:
    extra = bundle / (".hidden" if what == "hidden" else "extra")
    if what == "folder":
        extra.mkdir()
    elif what == "link":
        extra.symlink_to(bundle / "weights.bin")
    else:
        extra.write_bytes(b"")
    found = failed(bundle)
    assert list(found) == ["nothing else"]
    assert extra.name in found["nothing else"]


def test_listed_files_may_lie_in_folders(bundle: Path) -> None:
    (bundle / "licences").mkdir()
    (bundle / "licences" / "LICENSE").write_bytes(b"text")
    facts = {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()}
    edit(bundle, lambda m: m["files"].update({"licences/LICENSE": facts}))
    assert list(failed(bundle)) == ["bill"]
    bill = json.loads((bundle / "sbom.cdx.json").read_text(encoding="utf-8"))
    hashes = [{"alg": "SHA-256", "content": facts["sha256"]}]
    bill["components"].append({"type": "file", "name": "licences/LICENSE", "hashes": hashes})
    (bundle / "sbom.cdx.json").write_text(json.dumps(bill), encoding="utf-8")
    own_up(bundle)
    assert failed(bundle) == {}
    (bundle / "licences" / "more").mkdir()
    assert "licences/more" in failed(bundle)["nothing else"]


MANIFESTS: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
    ("sizes", "cache.bytes", lambda m: m["cache"].update(bytes=m["cache"]["bytes"] // 2)),
    ("sizes", "cache.bytes", lambda m: m["cache"].update(dtype="float32")),
    ("sizes", "cache.shape", lambda m: m["cache"]["shape"].reverse()),
    ("sizes", "cache.shape", lambda m: m["cache"].pop("shape")),
    ("sizes", "cache.layers", lambda m: m["cache"].update(layers=3)),
    ("sizes", "bits_per_weight", lambda m: m["weights"].update(bits_per_weight=4.0)),
    ("sizes", "weights.bytes", lambda m: m["weights"].update(bytes=1)),
    ("sizes", "weights.parameters", lambda m: m["weights"].update(parameters=0)),
    ("sizes", "weights.parameters", lambda m: m["weights"].update(parameters=True)),
    ("sizes", "weights.parameters", lambda m: m["weights"].update(parameters=10**400)),
    ("sizes", "sum of weights.parts.parameters", lambda m: m["weights"]["parts"].pop()),
    ("sizes", "weights.parts", lambda m: m["weights"].update(parts=[1])),
    ("sizes", "weights.parts.part", lambda m: m["weights"]["parts"][0].update(part="")),
    ("sizes", "weights.parts.bits_per_weight", lambda m: m["weights"]["parts"][0].update(bits_per_weight=1)),
    ("sizes", "bos_token_id", lambda m: m["model"].update(bos_token_id=384)),
    ("sizes", "model.heads", lambda m: m["model"].update(heads=8)),
    ("sizes", "model.hidden_size", lambda m: m["model"].pop("hidden_size")),
    ("manifest", "eos_token_ids", lambda m: m["model"].update(eos_token_ids=[384])),
    ("licence", "licence", lambda m: m.pop("licence")),
    ("licence", "licence.id", lambda m: m["licence"].update(id="")),
    ("licence", "licence.source", lambda m: m["licence"].pop("source")),
    ("licence", "licence.lineage", lambda m: m["licence"].pop("lineage")),
    ("licence", "licence.lineage", lambda m: m["licence"].update(lineage=["base", " "])),
    ("licence", "source.model", lambda m: m["source"].update(model="another")),
    ("origin", "source.sha256", lambda m: m["source"].update(sha256="0")),
    ("origin", "recipe", lambda m: m.update(recipe={})),
    ("origin", "recipe.target", lambda m: m["recipe"].pop("target")),
    ("origin", "stages and a seed", lambda m: m["recipe"].pop("seed")),
    ("origin", "history", lambda m: m.update(history={})),
    ("origin", "history.key", lambda m: m["history"][0].update(key="x")),
    ("origin", "versions", lambda m: m.update(versions={})),
    ("origin", "versions.numpy", lambda m: m["versions"].update(numpy=2)),
    ("manifest", "graphs must name model", lambda m: m.update(task="speech")),
]


@pytest.mark.parametrize(("check", "words", "change"), MANIFESTS, ids=[f"{c}-{w}" for c, w, _ in MANIFESTS])
def test_a_manifest_that_disagrees(
    bundle: Path, check: str, words: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(bundle, change)
    found = failed(bundle)
    assert words in found[check]
    assert next(iter(found)) == check


def test_a_vocabulary_larger_than_the_logits(bundle: Path) -> None:
    file = bundle / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["onemore"] = 384
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    edit(bundle, lambda m: None)
    assert failed(bundle) == {
        "tokenizer": "tokenizer.json should have ids below the 384 logits, but has 384: build the bundle again"
    }


@pytest.mark.parametrize(("name", "words"), [("tokenizer.json", "not a tokenizer"), ("chat_template.jinja", "compile")])
def test_a_tokenizer_or_template_that_does_not_open(bundle: Path, name: str, words: str) -> None:
    (bundle / name).write_text("{% if", encoding="utf-8")
    edit(bundle, lambda m: None)
    found = failed(bundle)
    assert list(found) == ["tokenizer"] and words in found["tokenizer"]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("format should be", lambda bill: bill.update(specVersion="9.9")),
        ("model should be", lambda bill: bill["metadata"]["component"].update(type="library")),
        ("model should be", lambda bill: bill["metadata"]["component"].update(name="another")),
        ("licence should be", lambda bill: bill["metadata"]["component"].update(licenses=[])),
        ("lineage should be", lambda bill: bill["metadata"]["component"]["pedigree"]["ancestors"].clear()),
        ("files should be", lambda bill: bill["components"].clear()),
        ("no CycloneDX bill of a model", lambda bill: bill["metadata"].clear()),
        ("no CycloneDX bill of a model", lambda bill: bill.update(components=3)),
        ("no CycloneDX bill of a model", lambda bill: bill["metadata"]["component"].update(licenses=[{"license": {}}])),
    ],
)
def test_a_bill_that_disagrees(bundle: Path, words: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle / "sbom.cdx.json"
    bill = json.loads(file.read_text(encoding="utf-8"))
    change(bill)
    file.write_text(json.dumps(bill), encoding="utf-8")
    write_hash(bundle, file.name)
    found = failed(bundle)
    assert list(found) == ["bill"] and words in found["bill"]


def test_a_bundle_without_a_bill(bundle: Path) -> None:
    (bundle / "sbom.cdx.json").unlink()
    edit(bundle, lambda m: m["files"].pop("sbom.cdx.json"))
    assert failed(bundle) == {"bill": "the bundle should list sbom.cdx.json but does not: build it again"}


def _rename(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    graph.output[[o.name for o in graph.output].index("logits")].name = "scores"


def _dimension(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _add(graph: onnx.GraphProto) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename, "the graph's output 'logits' is missing"),
        (_dimension, "the graph's input 'input_ids' should be tensor(int64) [*, *], but is tensor(int64) [1, *]"),
        (_add, "the graph's input 'extra' is one too many"),
    ],
)
def test_a_graph_with_other_ends(bundle: Path, change: Callable[[onnx.GraphProto], None], words: str) -> None:
    """Loading refuses it too, before anything is run."""
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    change(model.graph)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    edit(bundle, lambda m: None)
    found = failed(bundle)
    assert list(found) == ["graph"] and words in found["graph"]
    with pytest.raises(ContractError, match="the graph's"):
        load(bundle)


def test_a_manifest_of_another_model(bundle: Path) -> None:
    """Sizes that agree among themselves and not with the graph."""

    def shrink(manifest: dict[str, Any]) -> None:
        manifest["model"]["context"] = 64
        manifest["cache"].update(shape=[1, 7, 64, 16], bytes=manifest["cache"]["bytes"] // 2)

    edit(bundle, shrink)
    found = failed(bundle)
    assert list(found) == ["graph"]
    assert (
        "past_key.0' should be tensor(float16) [*, 7, 64, 16], but is tensor(float16) [*, 7, 128, 16]"
        in (found["graph"])
    )


def test_a_sentence_is_one_line_of_text(bundle: Path) -> None:
    """What a stranger wrote into a manifest doesn't steer the terminal, nor does it break the JSON."""
    edit(bundle, lambda m: m["weights"].update(bytes="\x1b[2J\ud800\n" * 999))
    problem = failed(bundle)["sizes"]
    assert problem.isprintable() and len(problem) < 700
    result = CliRunner().invoke(main, ["verify", str(bundle)])
    assert result.exit_code == 1 and json.loads(result.stdout)


def test_it_needs_the_base_install_alone(bundle: Path) -> None:
    code = (
        "import sys; from edgepipe.verify import verify_bundle; checks = verify_bundle(sys.argv[1])['checks'];"
        "assert all(c['ok'] for c in checks);"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir', 'gguf', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
