"""Calibration sets: bytes are vouched for, and evaluation text stays out of calibration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgepipe import package_data
from edgepipe.calibration import describe_set, list_sets, open_text, passages
from edgepipe.errors import ConfigError


@pytest.fixture
def own_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the shipped sets to where this test may damage them, and let edgepipe find them there."""
    shutil.copytree(package_data.data_folder("calibration"), tmp_path / "_data" / "calibration")
    monkeypatch.setattr(package_data, "_PACKAGE", tmp_path)
    return tmp_path / "_data" / "calibration"


@pytest.mark.parametrize("name", [s.name for s in list_sets()])
def test_every_shipped_set_holds_what_it_says(name: str) -> None:
    """The text opens with its hash intact and has as many passages as its record counts."""
    record = describe_set(name)
    text = open_text(name, purpose=record.purpose)
    assert len(passages(text)) == record.count
    assert "\r" not in text and "\t" not in text


def test_the_evaluation_text_is_long_enough() -> None:
    """Perplexity on fewer than about 2,000 words swings by chance."""
    assert len(open_text("prose-eval").split()) >= 1800


def test_no_set_shares_a_passage_with_one_of_the_other_purpose() -> None:
    """Every passage belongs to evaluation or to calibration: a copy under another name counts as well."""
    seen = {"evaluation": set[str](), "calibration": set[str]()}
    for record in list_sets():
        seen[record.purpose].update(passages(open_text(record.name, purpose=record.purpose)))
    assert seen["evaluation"] and not seen["evaluation"] & seen["calibration"]


def test_evaluation_text_is_refused_for_calibration() -> None:
    """A score on text that steered the compression would flatter it."""
    with pytest.raises(ConfigError, match="prose-eval is for evaluation and can't serve calibration"):
        open_text("prose-eval", purpose="calibration")


def test_calibration_text_is_refused_for_evaluation(own_sets: Path) -> None:
    """The other way round holds too, and the sentence lists the sets that would do."""
    record = own_sets / "prose-eval.toml"
    (own_sets / "own.toml").write_text(record.read_text().replace('"evaluation"', '"calibration"', 1))
    assert open_text("own", purpose="calibration") == open_text("prose-eval")
    with pytest.raises(ConfigError, match=r"own is for calibration .* sets for that are prose-eval$"):
        open_text("own")


def test_a_changed_text_is_refused(own_sets: Path) -> None:
    """One changed byte is enough."""
    text = own_sets / "prose-eval.txt"
    data = bytearray(text.read_bytes())
    data[100] ^= 1
    text.write_bytes(data)
    with pytest.raises(ConfigError, match=r"not the text that prose-eval\.toml vouches for"):
        open_text("prose-eval")


def test_a_missing_text_is_refused(own_sets: Path) -> None:
    """A record without its text says which file is missing."""
    (own_sets / "prose-eval.txt").unlink()
    with pytest.raises(ConfigError, match=r"can't be read from .*prose-eval\.txt"):
        open_text("prose-eval")


@pytest.mark.parametrize("name", ["../prose-eval.txt", "/etc/passwd", "a\\\\b", "..", ""])
def test_a_text_outside_the_folder_is_refused(own_sets: Path, name: str) -> None:
    """The record names a plain file beside itself."""
    path = own_sets / "prose-eval.toml"
    path.write_text(path.read_text().replace('file = "prose-eval.txt"', f'file = "{name}"'))
    with pytest.raises(ConfigError, match="plain file name"):
        open_text("prose-eval")


def test_an_unknown_set_lists_the_known_ones() -> None:
    """A typing error is answered with the closest name and the list."""
    with pytest.raises(ConfigError, match=r"unknown calibration set 'prose_eval' \(did you mean 'prose-eval'\?\)"):
        open_text("prose_eval")


def test_a_record_with_a_wrong_hash_field_is_refused(own_sets: Path) -> None:
    """A hash that can't be a sha256 is caught before the text is read."""
    path = own_sets / "prose-eval.toml"
    path.write_text(path.read_text().replace('sha256 = "', 'sha256 = "Z'))
    with pytest.raises(ConfigError, match="64 lower-case hex digits"):
        describe_set("prose-eval")
