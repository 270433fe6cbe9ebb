"""Children: a line each way, and every way of failing is one sentence."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepipe.errors import StageError
from edgepipe.measuring import child
from edgepipe.measuring.child import Child

ECHO = """
import json, sys
print(json.dumps({"arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "die" in asked:
        print("first words", "last words", sep="\\n", file=sys.stderr)
        sys.exit(asked["die"])
    if "noise" in asked:
        sys.stderr.write("x" * asked["noise"])
    print(json.dumps({"heard": asked}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """Return a function that writes a program and says how Python runs it."""

    def write(code: str) -> tuple[str, ...]:
        (tmp_path / "program.py").write_text(code, encoding="utf-8")
        return ("-P", str(tmp_path / "program.py"))

    return write


def test_a_child_answers_line_by_line(program: Callable[[str], tuple[str, ...]]) -> None:
    """However much it writes to stderr meanwhile: nobody reads a pipe that could fill up."""
    with Child("it", ["speed", "größe"], program(ECHO)) as one:
        assert one.ready == {"arguments": ["speed", "größe"]}
        assert one.ask({"n": 1}) == {"heard": {"n": 1}}
        assert one.ask({"noise": 1 << 20}) == {"heard": {"noise": 1 << 20}}
    assert one._process.returncode == 0


def test_what_it_said_last_is_the_message(program: Callable[[str], tuple[str, ...]]) -> None:
    with (
        Child("a bundle", [], program(ECHO)) as one,
        pytest.raises(StageError, match=r"^measuring a bundle ended with exit code 3: last words$"),
    ):
        one.ask({"die": 3})


def test_a_child_that_ends_without_a_word(program: Callable[[str], tuple[str, ...]]) -> None:
    """Killed for memory, for example; a question to the dead is one sentence too."""
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(StageError, match=r"ended with exit code -9: no message"):
        Child("it", [], program(killed))
    with Child("it", [], program("print('{}', flush=True)")) as one:
        one._process.wait()
        with pytest.raises(StageError, match="exit code 0: no message"):
            one.ask({})


def test_a_child_that_hangs_is_stopped(
    program: Callable[[str], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_TIMEOUT_S", 0.3)
    with pytest.raises(StageError, match=r"measuring it took longer than 0\.3 s: it was stopped"):
        Child("it", [], program("import time; time.sleep(60)"))


def test_an_error_ends_the_child(program: Callable[[str], tuple[str, ...]]) -> None:
    """One that would not notice that its input ended is not waited for."""
    deaf = "import time; print('{}', flush=True); time.sleep(60)"
    with pytest.raises(KeyError), Child("it", [], program(deaf)) as one:
        raise KeyError
    assert one._process.returncode == (-9 if sys.platform != "win32" else 1)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs /proc to see what a process costs")
def test_who_has_answered_leaves_the_processor_to_the_next(tiny_bundle: Path, tmp_path: Path) -> None:
    """The engine's threads spin after a run: by the time `ask` returns they have stopped."""
    text = tmp_path / "text.txt"
    text.write_text("The river carried the timber down to the mill. " * 200, encoding="utf-8")
    with Child("the index", ["index", str(tiny_bundle), str(text), "2"]) as clock:
        rounds = []
        while len(rounds) < 5 and (not rounds or rounds[-1] > 10):  # on a busy machine threads end their turn late
            rounds.append(statistics.median(after_an_answer_ms(clock) for _ in range(5)))
    assert rounds[-1] <= 10, rounds  # 40 ms without the pause


def after_an_answer_ms(clock: Child) -> float:
    """Return the ms of processor time that a child uses within 100 ms of its answer."""
    clock.ask({})
    before = processor_ms(clock._process.pid)
    time.sleep(0.1)
    return processor_ms(clock._process.pid) - before


def processor_ms(pid: int) -> float:
    """Return the ms of processor time that a process's threads have used, from the scheduler's own count in ns."""
    counts = (file.read_text(encoding="ascii") for file in Path("/proc").glob(f"{pid}/task/*/schedstat"))
    return sum(int(count.split()[0]) for count in counts) / 1e6
