"""What `edgepipe stages` says: every stage has a summary, every option a meaning, and a default as users write it."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from edgepipe import stage_help
from edgepipe.errors import ConfigError
from edgepipe.recipe import DEFAULT_STAGES, find_stage, list_stages, resolve, stage_options
from edgepipe.stage_help import describe_stages, stage_options_help

OPTIONS = [(stage, option["name"]) for stage in list_stages() for option in stage_options_help(stage)]


def test_every_stage_has_a_summary() -> None:
    found = {stage["name"]: stage["summary"] for stage in describe_stages()}
    assert tuple(found) == list_stages()
    for name, summary in found.items():
        assert 20 < len(summary) < 140, name
        assert summary.endswith("."), summary


@pytest.mark.parametrize("stage", list_stages())
def test_every_option_of_a_stage_is_listed(stage: str) -> None:
    kind = find_stage(stage)
    assert [option["name"] for option in stage_options_help(stage)] == list(stage_options(kind()))


@pytest.mark.parametrize(("stage", "name"), OPTIONS, ids=lambda value: value)
def test_every_option_has_a_meaning(stage: str, name: str) -> None:
    (option,) = [o for o in stage_options_help(stage) if o["name"] == name]
    assert len(option["meaning"]) > 10
    assert not option["meaning"].startswith("#")


@pytest.mark.parametrize(("stage", "name"), OPTIONS, ids=lambda value: value)
def test_a_default_stands_as_it_would_in_a_recipe(stage: str, name: str) -> None:
    (option,) = [o for o in stage_options_help(stage) if o["name"] == name]
    value = tomllib.loads(f"value = {option['default']}")["value"]
    before = [] if stage in DEFAULT_STAGES else [stage]
    with_default = resolve(target=None, settings=[(stage, name, value)], before=before)
    assert with_default == resolve(target=None, before=before)


def test_an_unknown_stage() -> None:
    with pytest.raises(ConfigError, match=r"no stage 'exporrt' \(did you mean 'export'"):
        stage_options_help("exporrt")
    with pytest.raises(
        ConfigError,
        match="no stage 'shrink': known are compile, distill, exits, export, measure, prune, quantize, trim",
    ):
        stage_options_help("shrink")


SOURCE = '''\
"""Shrink: make it smaller.

More of the story.
"""

from dataclasses import dataclass

@dataclass(frozen=True)
class Other:
    ratio: float = 1.0  # of another class

@dataclass(frozen=True)
class Shrink:
    ratio: float = 0.5  # share that is left, in (0, 1]: 1 keeps all
    mark: str = "# no comment"  # text with a # in it
    names: tuple[str, ...] = (
        "a",
        "b",
    )  # after several lines
    from_: bool = False
'''


def test_the_meaning_is_the_comment_beside_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stage_of_a_test.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("stage_of_a_test")
    monkeypatch.setattr(stage_help, "find_stage", lambda name: module.Shrink)
    monkeypatch.setattr(stage_help, "list_stages", lambda: ("shrink",))
    assert describe_stages() == [{"name": "shrink", "summary": "make it smaller."}]
    assert stage_options_help("shrink") == [
        {"name": "ratio", "default": "0.5", "meaning": "share that is left, in (0, 1]: 1 keeps all"},
        {"name": "mark", "default": '"# no comment"', "meaning": "text with a # in it"},
        {"name": "names", "default": '["a", "b"]', "meaning": "after several lines"},
        {"name": "from", "default": "false", "meaning": ""},
    ]
