"""One run at a time: who comes second is refused, and nobody waits for the dead."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgepipe.errors import ConfigError
from edgepipe.lock import alone

HOLDER = """
import sys, time
from pathlib import Path
from edgepipe.lock import alone
with alone(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock file until it is killed."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(path)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_is_refused_at_once_and_the_file_goes_with_the_first(tmp_path: Path) -> None:
    with alone(tmp_path / ".lock", "runs/x"):
        started = time.perf_counter()
        with pytest.raises(ConfigError) as caught, alone(tmp_path / ".lock", "runs/x"):
            pass
        assert time.perf_counter() - started < 0.5
        assert (tmp_path / ".lock").exists()
    assert str(caught.value) == ("another run is at work in runs/x: wait until it has ended, then repeat the command")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = hold(tmp_path / ".lock")
    try:
        with pytest.raises(ConfigError, match="another run"), alone(tmp_path / ".lock", "it"):
            pass
    finally:
        child.kill()
        child.communicate()
    assert (tmp_path / ".lock").exists()
    with alone(tmp_path / ".lock", "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_child_process_that_outlives_the_run_holds_nothing(tmp_path: Path) -> None:
    with alone(tmp_path / ".lock", "it"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with alone(tmp_path / ".lock", "it"):
            pass
    finally:
        child.kill()
        child.communicate()


def test_folders_that_were_made_go_unless_something_is_in_them(tmp_path: Path) -> None:
    with alone(tmp_path / "a" / "b" / ".lock", "it"):
        pass
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "a" / "b" / ".lock", "it"):
        (tmp_path / "a" / "kept").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "mine").mkdir()
    with alone(tmp_path / "mine" / ".lock", "it"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_place_that_takes_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = pytest.raises(ConfigError, match=r"^--out x can't be locked: .*; name another place$")
    with expected, alone(tmp_path / "file" / ".x.lock", "--out x"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_locks(monkeypatch, number)
    done = False
    with alone(tmp_path / ".lock", "it"):
        done = True
    assert done
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
def test_a_lock_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(ConfigError, match="it can't be locked: Input/output error"), alone(tmp_path / ".lock", "it"):
        pass


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the system refuse every lock with an error number."""

    def refuse(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_never_two_at_a_time(tmp_path: Path) -> None:
    """The file is removed at the end of each turn: whoever had opened it before must not take it for the lock."""
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until or (len(most) <= 100 and time.monotonic() < until + 60):
            try:
                with alone(tmp_path / "made" / ".lock", "it"):
                    inside.append(number)
                    most.append(len(inside))
                    time.sleep(0.0002)
                    inside.remove(number)
            except ConfigError:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 100
    assert max(most) == 1
    assert not (tmp_path / "made" / ".lock").exists()
