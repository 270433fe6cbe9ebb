"""The conformance vectors of a student: logits over a source, answers and scores, held to the runtime."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.bundle import SCHEMA
from edgepipe.runtime import Model, load
from edgepipe.runtime.bundle import read_bundle
from edgepipe.runtime.onnxruntime import Decoder, open_decoder
from edgepipe.verify import verify_bundle

HOMES = sorted(path.parent for path in Path(__file__).resolve().parent.glob("schema-*/student/student.json"))

every_set = pytest.mark.parametrize("home", HOMES, ids=lambda home: home.parent.name)


@cache
def vectors(home: Path) -> dict[str, Any]:
    """Return the vectors of a set."""
    return dict(json.loads((home / "student.json").read_text(encoding="utf-8")))


@cache
def model(home: Path) -> Model:
    """Return the loaded bundle of a set."""
    loaded = load(home / "bundle", threads=1)
    assert isinstance(loaded, Model)
    return loaded


@cache
def decoder(home: Path) -> Decoder:
    """Open the graphs alone."""
    opened = read_bundle(home / "bundle")
    return open_decoder(opened.path, opened.manifest, 1)


def expected(home: Path) -> list[np.ndarray]:
    """Return the logits [n, vocab] of each sequence."""
    stored = [np.frombuffer(base64.b64decode(row["logits"]), "<f4") for row in vectors(home)["sequences"]]
    return [row.reshape(-1, decoder(home).vocab_size) for row in stored]


def test_there_is_one_of_today() -> None:
    assert [home.parent.name for home in HOMES] == [f"schema-{SCHEMA}"]  # of a bundle as it is made today
    for home in HOMES:
        assert [check for check in verify_bundle(home / "bundle")["checks"] if check["ok"] is not True] == []


@every_set
@pytest.mark.parametrize("pieces", [[6], [2, 4], [1] * 6], ids=str)
def test_logits(home: Path, pieces: list[int]) -> None:
    """Torch's, however the answer's tokens are split into calls, of one source after the other over one cache."""
    cache = decoder(home).new_cache(1)
    for row, wanted in zip(vectors(home)["sequences"], expected(home), strict=True):
        decoder(home).read_source(cache, 0, np.array([row["source"]]))
        start = 0
        for size in pieces:
            ids, places = np.array([row["ids"][start : start + size]]), np.arange(ids_in(row, start, size))[None]
            got = decoder(home).run(cache, ids, np.array([start]), np.array([ids.shape[1]]), places)
            assert np.abs(got[0] - wanted[start : start + ids.shape[1]]).max() <= vectors(home)["tolerance"]
            start += ids.shape[1]


def ids_in(row: dict[str, Any], start: int, size: int) -> int:
    """Return how many ids a piece has."""
    return len(row["ids"][start : start + size])


@every_set
def test_a_batch(home: Path) -> None:
    """Sources of other lengths beside each other, a token of every row per call."""
    rows = vectors(home)["sequences"]
    assert len({len(row["source"]) for row in rows}) > 1
    cache, zeros = decoder(home).new_cache(len(rows)), np.zeros((len(rows), 1), np.int64)
    for number, row in enumerate(rows):
        decoder(home).read_source(cache, number, np.array([row["source"]]))
    for step in range(min(len(row["ids"]) for row in rows)):
        ids = np.array([[row["ids"][step]] for row in rows])
        got = decoder(home).run(cache, ids, np.full(len(rows), step), np.ones(len(rows), np.int64), zeros)
        wanted = np.stack([logits[step] for logits in expected(home)])
        assert np.abs(got[:, 0] - wanted).max() <= vectors(home)["tolerance"]


@every_set
def test_answers(home: Path) -> None:
    """From text to ids, greedy and drawn, to the end token or the limit."""
    found = vectors(home)["answers"]
    assert {row["finish_reason"] for row in found} >= {"stop"} and len({tuple(row["ids"]) for row in found}) > 3
    for row in found:
        assert model(home).encode(row["prompt"]) == row["source_ids"]
        asked = {"max_new_tokens": row["max_new_tokens"], "seed": row["seed"], **row["options"]}
        answer = model(home).generate(row["prompt"], **asked)
        assert (list(answer.token_ids), answer.finish_reason) == (row["ids"], row["finish_reason"])


@every_set
def test_scores(home: Path) -> None:
    """One step, and the tokens that are asked for."""
    for row in vectors(home)["scores"]:
        got = model(home).score(row["prompt"], row["tokens"])
        assert np.abs(got - np.array(row["logprobs"])).max() <= 2 * vectors(home)["tolerance"]
