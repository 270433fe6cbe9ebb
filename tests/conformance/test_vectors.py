"""The conformance vectors: the runtime, the bare example and bundles of every manifest schema are held to them."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError
from edgepipe.runtime import Model, load
from edgepipe.runtime.bundle import SCHEMA, read_bundle
from edgepipe.runtime.onnxruntime import Decoder, open_decoder
from edgepipe.runtime.sampling import Sampling, choose_token, filter_logits, random_generator
from edgepipe.verify import verify_bundle
from tests.conformance.reference import RandomNumbers

HERE = Path(__file__).resolve().parent
SETS = sorted(path.parent for path in HERE.glob("schema-*/*/vectors.json"))

every_set = pytest.mark.parametrize("home", SETS, ids=lambda home: home.relative_to(HERE).as_posix())


@cache
def vectors(home: Path) -> dict[str, Any]:
    """Return the vectors of a set."""
    return dict(json.loads((home / "vectors.json").read_text(encoding="utf-8")))


@cache
def model(home: Path) -> Model:
    """Return the loaded bundle of a set."""
    return load(home / "bundle", threads=1)


def decoder(bundle: Path) -> Decoder:
    """Open the graph alone."""
    opened = read_bundle(bundle)
    return open_decoder(opened.path, opened.manifest, 1)


def worst(home: Path, graph: Decoder) -> dict[str, float]:
    """Return the largest difference of a logit in each of the set's calls."""
    stored = [np.frombuffer(base64.b64decode(s["logits"]), "<f4") for s in vectors(home)["sequences"]]
    expected = [s.reshape(-1, graph.vocab_size) for s in stored]
    found = {}
    for call in vectors(home)["calls"]:
        buffers = graph.new_cache(len(call["steps"][0]["input_ids"]))
        errors = []
        for step in call["steps"]:
            arrays = [np.array(step[name], np.int64) for name in ("input_ids", "past", "lengths", "wanted")]
            wanted = np.array([[expected[s][i] for s, i in row] for row in step["expect"]])
            errors.append(float(np.abs(graph.run(buffers, *arrays) - wanted).max()))
        found[call["name"]] = max(errors)
    return found


def test_there_is_a_set_of_every_schema(tiny_bundle: Path) -> None:
    """Three grids of schema 1, and one set at least of the schema that a bundle has that is made today."""
    assert {home.name for home in SETS if home.parent.name == "schema-1"} == {"symmetric", "zero-points", "minima"}
    today = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))["schema"]
    assert f"schema-{today}" in {home.parent.name for home in SETS}
    for home in SETS:
        assert f"schema-{read_bundle(home / 'bundle').manifest['schema']}" == home.parent.name


@every_set
def test_a_stored_bundle_is_whole(home: Path) -> None:
    checks = verify_bundle(home / "bundle")["checks"]
    assert [check for check in checks if check["ok"] is not True] == []


@every_set
def test_logits(home: Path) -> None:
    """Those of transformers, however the tokens are split into calls."""
    found = worst(home, decoder(home / "bundle"))
    assert len(found) == 6
    assert all(error <= vectors(home)["tolerance"] for error in found.values()), found


@every_set
def test_a_changed_weight_is_noticed(home: Path, tmp_path: Path) -> None:
    """The tolerance is no wider than it must be: one bit of a code is seen."""
    bundle = Path(shutil.copytree(home / "bundle", tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    file, deflated = bundle / manifest["weights"]["file"], "unpacked" in manifest["weights"]
    content = bytearray(zlib.decompress(file.read_bytes()) if deflated else file.read_bytes())
    for place in range(0, 4096, 64):
        content[place] ^= 0x08
    file.write_bytes(zlib.compress(content) if deflated else content)
    manifest["files"][file.name]["bytes"] = file.stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert max(worst(home, decoder(bundle)).values()) > vectors(home)["tolerance"]


@every_set
def test_tokens_and_texts(home: Path) -> None:
    tokenizer = model(home).tokenizer
    for vector in vectors(home)["encode"]:
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        assert tokenizer.encode(vector["text"], add_special_tokens=False) == vector["plain"]
    for vector in vectors(home)["decode"]:
        assert tokenizer.decode(vector["ids"]) == vector["text"]


@every_set
def test_chats(home: Path) -> None:
    for vector in vectors(home)["chat"]:
        text = model(home).apply_chat_template(vector["messages"])
        assert text == vector["text"]
        assert model(home).tokenizer.encode(text, add_special_tokens=False) == vector["ids"]


@every_set
def test_random_numbers(home: Path) -> None:
    for vector in vectors(home)["random"]:
        assert random_generator(vector["seed"]).random(4).tolist() == vector["numbers"]


def test_rows_have_the_next_seeds() -> None:
    numbers = RandomNumbers(42 + 3)
    assert random_generator(42, 3).random(4).tolist() == [numbers.next() for _ in range(4)]


@every_set
def test_filters_and_draws(home: Path) -> None:
    """What stays, with which logit, and what is drawn; equal logits at every border."""
    for vector in vectors(home)["filters"]:
        sampling, logits = Sampling(**vector["options"]), np.array(vector["logits"], np.float32)
        left = filter_logits(logits, vector["seen"], sampling)
        kept = {str(token): float(left[token]) for token in np.flatnonzero(left > -np.inf)}
        assert kept == pytest.approx(vector["kept"], rel=1e-6)
        numbers = random_generator(vector["seed"])
        drawn = [choose_token(logits, vector["seen"], sampling, numbers) for _ in vector["drawn"]]
        assert drawn == vector["drawn"]


@every_set
def test_answers(home: Path) -> None:
    """From text to ids, greedy and drawn."""
    assert len({tuple(vector["ids"]) for vector in vectors(home)["answers"]}) > 3
    for vector in vectors(home)["answers"]:
        asked = {"max_new_tokens": vector["max_new_tokens"], "seed": vector["seed"], **vector["options"]}
        answer = model(home).generate(vector["prompt"], **asked)
        assert (list(answer.token_ids), answer.finish_reason) == (vector["ids"], vector["finish_reason"])


@every_set
def test_stops(home: Path) -> None:
    """At an end token, a stop text or the limit, whole and as a stream."""
    assert {vector["finish_reason"] for vector in vectors(home)["stops"]} == {"stop", "length"}
    for vector in vectors(home)["stops"]:
        asked = {"max_new_tokens": vector["max_new_tokens"], "stop": vector["stop"]}
        answer = model(home).generate(vector["prompt"], **asked)
        assert answer.text == vector["text"]
        assert (list(answer.token_ids), answer.finish_reason) == (vector["ids"], vector["finish_reason"])
        assert "".join(model(home).generate(vector["prompt"], stream=True, **asked)) == vector["text"]


@every_set
def test_the_bare_example(home: Path) -> None:
    """Nothing but onnxruntime and tokenizers, greedily."""
    file = HERE.parents[1] / "examples" / "bare_onnxruntime.py"
    spec = importlib.util.spec_from_file_location("bare_onnxruntime", file)
    assert spec and spec.loader
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    greedy = [vector for vector in vectors(home)["stops"] if not vector["stop"]]
    assert len(greedy) == 2
    for vector in greedy:
        found = bare.continue_text(home / "bundle", vector["prompt"], vector["max_new_tokens"])
        assert found == (vector["text"], vector["ids"])


def test_a_newer_schema_is_refused_with_one_sentence(tmp_path: Path) -> None:
    """By loading, by verify and by the command."""
    bundle = Path(shutil.copytree(SETS[0] / "bundle", tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": SCHEMA + 1}), encoding="utf-8")
    sentence = f"this bundle has manifest schema {SCHEMA + 1}, but this edgepipe reads up to {SCHEMA}: update edgepipe"
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        load(bundle)
    done = CliRunner().invoke(main, ["run", str(bundle), "The river"])
    assert (done.exit_code, done.stderr) == (2, f"edgepipe: {sentence}\n")
    assert verify_bundle(bundle)["checks"][0] == {"name": "manifest", "ok": False, "problem": sentence}
