"""Directories that appear whole or not at all, and what killed runs left of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepipe import store


def fill(directory: Path, text: str) -> Path:
    """Make a directory of one file."""
    directory.mkdir()
    (directory / "file").write_text(text, encoding="utf-8")
    return directory


def names(folder: Path) -> list[str]:
    """Return what lies in a folder, hidden names included."""
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("earlier", [False, True])
def test_publishing_replaces_the_whole_directory(tmp_path: Path, earlier: bool) -> None:
    if earlier:
        fill(tmp_path / "out", "old")
        (tmp_path / "out" / "left over").touch()
    store.publish(fill(tmp_path / "staged", "new"), tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_publishing_that_fails_restores_the_earlier_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out, staged = fill(tmp_path / "out", "old"), fill(tmp_path / "staged", "new")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == staged:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        store.publish(staged, out)
    assert names(tmp_path) == ["out", "staged"]
    assert (out / "file").read_text(encoding="utf-8") == "old"


def test_publishing_passes_over_what_a_killed_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process ids come again, in containers above all: the old directory of a killed run may have our name."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    fill(tmp_path / ".out.old-7", "older")
    fill(tmp_path / "out", "old")
    store.publish(fill(tmp_path / "staged", "new"), tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"


STAGES = r"\d\d-\w+|run\.json"


def test_what_killed_runs_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".01-quantize.tmp", ".02-export.work", ".01-quantize.gone-12", ".03-compile.old-7", "03-compile"):
        fill(tmp_path / name, name)
    (tmp_path / ".run.json.tmp").touch()
    for name in (".out.tmp", ".out.old-3", ".01-quantize.mine", "01-quantize", "notes.tmp", ".tmp"):
        fill(tmp_path / name, "kept")
    store.tidy(tmp_path, STAGES)
    assert names(tmp_path) == [
        *(".01-quantize.mine", ".out.old-3", ".out.tmp", ".tmp", "01-quantize", "03-compile", "notes.tmp")
    ]
    store.tidy(tmp_path / "absent", STAGES)


def test_a_directory_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames: the earlier one is whole, the new one never got its name."""
    fill(tmp_path / ".out.old-7", "old")
    fill(tmp_path / ".out.tmp", "new")
    store.tidy(tmp_path, "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "old"


def test_a_directory_that_was_half_deleted_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    deleted: list[str] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **more: deleted.append(path.name))
    store.publish(fill(tmp_path / "staged", "new"), tmp_path / "out")
    monkeypatch.undo()
    assert deleted[-1] == f".out.gone-{os.getpid()}"
    assert f".out.gone-{os.getpid()}" in names(tmp_path)
    store.tidy(tmp_path, "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"


def test_a_directory_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, every folder, and the folder that holds the name: a power cut leaves it whole or not at all."""
    staged = fill(tmp_path / "staged", "new")
    fill(staged / "bundle", "content")
    store.seal(staged, "key")
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    known = {path.stat().st_ino: path.relative_to(tmp_path).as_posix() for path in (tmp_path, *tmp_path.rglob("*"))}

    def note_fsync(file: int) -> None:
        events.append(known[os.fstat(file).st_ino])
        fsync(file)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"{self.name} is now {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    store.publish(staged, tmp_path / "01")
    flushed = ["staged", "staged/bundle", "staged/bundle/file", "staged/file", "staged/key.json"]
    assert sorted(events[:5]) == flushed
    assert events[5:7] == ["staged is now 01", "."]


def test_a_disk_that_fails_to_flush_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many file systems say only then that there's no space."""
    out, staged = fill(tmp_path / "out", "old"), fill(tmp_path / "staged", "new")

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        store.publish(staged, out)
    with pytest.raises(OSError, match="No space left"):
        store.write_json(out / "a.json", {})
    assert names(tmp_path) == ["out", "staged"]
    assert names(out) == ["file"]


def add(folder: Path) -> None:
    """Put a file more into a folder."""
    (folder / "more").touch()


def cut(folder: Path) -> None:
    """Cut a file short."""
    (folder / "file").write_text("conten", encoding="utf-8")


def remove(folder: Path) -> None:
    """Delete a file."""
    (folder / "file").unlink()


def spoil(folder: Path) -> None:
    """Make the seal itself unreadable."""
    (folder / "key.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [add, cut, remove, spoil])
def test_a_seal_breaks_when_the_files_change(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = fill(tmp_path / "01", "content")
    assert not store.is_sealed(folder, "key")
    store.seal(folder, "key")
    assert store.is_sealed(folder, "key")
    assert not store.is_sealed(folder, "another key")
    damage(folder)
    assert not store.is_sealed(folder, "key")
