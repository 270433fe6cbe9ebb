"""Damaged bundles: `edgepipe verify` refuses each of 200 with one sentence; nothing crashes, hangs or eats memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.damages import OWNED_UP, PARTS, damages, own_up

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and pipes are POSIX, and sizes Linux's")

ROOT = Path(__file__).resolve().parents[2]
DAMAGES = damages()
SEED = 20261125
MOST_BYTES = 400 << 20  # of the child: onnxruntime takes 130 MiB, a manifest of several MiB some 50
TIMEOUT_S = 120

# Load compares sizes and reads no hashes, and leaves what it doesn't need to `verify`: licence, versions, bill.
UNSEEN = ("flip", "zero", "hash of", "extra", "without licence", "without versions", "empty licence", "weights/")
UNREAD = (  # an app needs no bill, and any text is a template
    *(f"{how}: sbom.cdx.json" for how in ("nothing", "half", "other JSON", "deep")),
    "swap chat_template.jinja, sbom.cdx.json, owned up",
)
UNSEEN_SIZES = ("cache/bytes", "cache/shape", "model/heads", "model/hidden_size", "model/bos_token_id is 384")


def in_children(bundles: list[Path]) -> Iterator[dict[str, Any]]:
    """Verify and load bundles in a child; another one goes on behind a bundle that ended it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    while bundles:
        command = [sys.executable, "-m", "tests.runtime.damaged_child", *map(str, bundles)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        yield from lines
        bundles = bundles[len(lines) :]
        if bundles:
            yield {"bundle": str(bundles.pop(0)), "code": f"ended with {done.returncode}: {done.stderr[-300:]}"}


@pytest.fixture(scope="module")
def found(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Damage, verify and load every bundle; return what came of each."""
    place = tmp_path_factory.mktemp("damaged")
    names: dict[str, str] = {}
    for number, (name, damage) in enumerate(DAMAGES.items()):
        bundle = Path(shutil.copytree(tiny_bundle, place / f"{number:03}"))
        damage(bundle, random.Random(f"{SEED} {name}"))
        names[str(bundle)] = name
    return {names[result["bundle"]]: result for result in in_children([Path(bundle) for bundle in names])}


def test_there_are_two_hundred() -> None:
    assert len(DAMAGES) >= 200


@pytest.mark.parametrize("name", DAMAGES, ids=lambda name: ascii(name)[1:-1])
def test_a_damage_is_refused_with_one_sentence(found: dict[str, dict[str, Any]], name: str) -> None:
    result = found[name]
    assert result["code"] == 1, result
    sentence = result["stderr"].splitlines()[-1]
    assert sentence.startswith("edgepipe: ") and sentence.isprintable() and 30 < len(sentence) < 800, sentence
    assert sum(line.startswith("edgepipe: ") for line in result["stderr"].splitlines()) == 1
    assert "Traceback" not in result["stderr"]
    checks = json.loads(result["stdout"].splitlines()[-1])["checks"]
    first = next(check for check in checks if check["ok"] is False)
    assert sentence == f"edgepipe: {first['name']}: {first['problem']}"


def test_no_damage_makes_memory_grow(found: dict[str, dict[str, Any]]) -> None:
    """The peak of the process that verified and loaded all of them."""
    assert max(result["peak_bytes"] for result in found.values()) < MOST_BYTES


@pytest.mark.parametrize("name", DAMAGES, ids=lambda name: ascii(name)[1:-1])
def test_loading_refuses_what_it_can_see(found: dict[str, dict[str, Any]], name: str) -> None:
    """A changed byte may pass, where any byte is right; nothing ends in another error than edgepipe's own."""
    assert found[name]["load"] in (
        ("refused", "loaded") if name.startswith((*UNSEEN, *UNSEEN_SIZES, *UNREAD)) else ("refused",)
    )


def test_bytes_changed_together_with_their_hashes(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nobody can tell a weight from another: some pass, some are refused, and none ends the process."""
    rng = random.Random(SEED)
    bundles = []
    for number in range(60):
        bundle = Path(shutil.copytree(tiny_bundle, tmp_path / str(number)))
        file = bundle / PARTS[1 + number % 3]
        content = bytearray(file.read_bytes())
        for place in rng.sample(range(len(content)), 1 + number % 4):
            content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        own_up(bundle)
        bundles.append(bundle)
    results = list(in_children(bundles))
    assert {result["code"] for result in results} == {0, 1}, [r for r in results if r["code"] not in (0, 1)]
    assert {result["load"] for result in results} == {"loaded", "refused"}
    assert max(result["peak_bytes"] for result in results) < MOST_BYTES
    for result in results:
        assert (result["code"] == 0) == (result["load"] == "loaded"), result


def test_every_owned_up_damage_changes_its_file(tiny_bundle: Path) -> None:
    """A replacement that finds nothing to replace would show nothing."""
    for how, name, make in OWNED_UP:
        content = (tiny_bundle / name).read_bytes()
        assert make(content, random.Random(0)) != content, f"{how}: {name}"
