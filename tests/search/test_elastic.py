"""Cutting a nested student to a budget: the widest member that fits, without training, and what can't be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError
from edgepipe.search.asked import Room, room_of
from edgepipe.search.elastic import members
from edgepipe.students.config import StudentConfig
from tests.decoders import saved
from tests.stages.test_prune import STACK
from tests.students.tiny import save_tiny_student
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder student of 3 layers whose FFNs of 2,048 are nested."""
    stack = {**STACK, "intermediate_size": 2048, "nested_widths": [256, 512, 1024, 2048]}
    return save_tiny_student(
        tmp_path_factory.mktemp("elastic") / "student", StudentConfig(kind="encoder", encoder=stack)
    )


def compressed(student: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the command in a folder of its own, without measure; return what click says of it."""
    recipe = folder / "recipe.toml"
    recipe.write_text('stages = ["prune", "quantize", "export", "compile"]', encoding="utf-8")
    monkeypatch.chdir(folder)
    given = ["compress", str(student), "--recipe", str(recipe), "--context", "32", *arguments]
    return CliRunner().invoke(main, given)


def test_members_grow_by_a_layer_and_never_shrink_with_depth() -> None:
    found = members(2, (8, 16, 32))
    assert found == [(8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
    assert members(3, (4,)) == [(4, 4, 4)]


def test_the_widest_member_that_fits_is_cut_out(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compressed(student, tmp_path, monkeypatch, "--budget-bytes", "600000")
    assert done.exit_code == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    chosen, tried = line["elastic"]["ffn_widths"], line["elastic"]["tried"]
    assert line["bundle_bytes"] <= 600_000
    family = members(3, (256, 512, 1024, 2048))
    place = family.index(tuple(chosen))
    assert 0 < place < len(family) - 1
    sizes = {tuple(one["ffn_widths"]): one["bytes"] for one in tried}
    assert sizes[family[place + 1]] > 600_000, "the next member was asked, and doesn't fit"
    manifest = json.loads((Path(line["bundle"]) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["history"][0]["options"]["ffn_widths"] == chosen
    assert not any(path.is_dir() for path in next((tmp_path / "runs").glob("*/elastic")).iterdir())


def test_a_budget_that_nothing_keeps_names_what_the_narrowest_takes(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compressed(student, tmp_path, monkeypatch, "--budget-bytes", "5000")
    assert done.exit_code == 3
    assert "no member of student fits in 5,000 bytes: the nearest possible is the narrowest's" in done.stderr
    assert not list(tmp_path.glob("runs/*/bundle"))


def test_what_is_not_nested_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compressed(saved(tmp_path, "llama grouped"), tmp_path, monkeypatch, "--budget-ms", "5")
    assert done.exit_code == 2
    assert "--budget-ms: llama-grouped is no student with nested widths: train one with" in done.stderr


def test_a_nested_decoder_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = save_tiny_model(tmp_path / "decoder", "llama", nested_widths=[25, 50, 100])
    done = compressed(decoder, tmp_path, monkeypatch, "--budget-bytes", "50000")
    assert done.exit_code == 2
    assert "decoder is a decoder, whose layers have one width: cut it out with prune.ffn, one of 25, 50" in done.stderr


def test_a_budget_is_one_number_above_0() -> None:
    assert room_of(None, None) is None
    for given, sentence in (
        ((5, 1.0), "give one of them"),
        ((0, None), "--budget-bytes: expected a number above 0, got 0"),
        ((-1, None), "--budget-bytes: expected a number above 0, got -1"),
        ((None, float("nan")), "--budget-ms: expected a number above 0, got nan"),
        ((None, float("inf")), "--budget-ms: expected a number above 0, got inf"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            room_of(*given)
    assert Room(ms=1.5).say(1.5) == "1.50 ms"
