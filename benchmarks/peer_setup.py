"""Set up the environments of the peers, each in .venv-peers/NAME. Needs nothing but Python and its venv module.

    python benchmarks/peer_setup.py [NAME …]     every one of benchmarks/peer_environments/NAME.txt unless named

An environment that can't be had is no end: .venv-peers/NAME/setup.json says why, benchmarks/peers.py shows it in the
peer's rows, and the next call tries again. `make bench` calls this first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "peer_environments"
ENVIRONMENTS = ROOT / ".venv-peers"
STATE = "setup.json"
# llama.cpp's switches for what /proc/cpuinfo shows. GGML_NATIVE and AMX stay off: the default build has died of SIGILL
# in its AMX path on machines that have it.
_SWITCHES = {
    "avx2": "GGML_AVX2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2",
    "avx512f": "GGML_AVX512",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
}


def main(names: list[str]) -> None:
    """Set up the named environments, or all."""
    known = sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no environment is called {', '.join(unknown)}: there are {', '.join(known)}")
    for name in names or known:
        state = set_up(name)
        print(f"{name}: {state.get('error', 'ready')}", file=sys.stderr, flush=True)


def set_up(name: str) -> dict[str, Any]:
    """Make one environment unless it is ready, and return what was done: command, seconds, and the error if any."""
    pins = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    home = ENVIRONMENTS / name
    state = read_state(name)
    if "error" not in state and state.get("pins") == pins:
        return state
    print(f"{name}: installing into {home.relative_to(ROOT)}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    arguments = ["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--requirement"]
    command = [str(home / "bin" / "python"), *arguments, str(REQUIREMENTS / f"{name}.txt")]
    more: dict[str, str] = {}
    if name == "llamacpp":
        more["CMAKE_ARGS"] = cmake_arguments(cpu_flags())
        command.insert(4, "--no-cache-dir")  # pip's cache doesn't know with which switches a wheel was compiled
    state = {"command": ["python", *command[1:-1], f"benchmarks/peer_environments/{name}.txt"], "pins": pins, **more}
    try:
        venv.create(home, with_pip=True, clear=True)
        done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            state["error"] = f"couldn't be installed: {last_error(done.stderr)}"
    except (OSError, subprocess.CalledProcessError) as error:
        state["error"] = f"couldn't be installed: no virtual environment could be made ({error})"
    state["seconds"] = round(time.monotonic() - begun)
    home.mkdir(parents=True, exist_ok=True)
    (home / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    return state


def read_state(name: str) -> dict[str, Any]:
    """Return what set_up left in an environment; an "error" when it was never set up."""
    try:
        state: dict[str, Any] = json.loads((ENVIRONMENTS / name / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"error": "wasn't set up: `make bench` does it"}
    return state


def cmake_arguments(flags: set[str]) -> str:
    """Return llama.cpp's switches for a processor that has `flags`, the names of /proc/cpuinfo."""
    return " ".join(["-DGGML_NATIVE=OFF", *(f"-D{s}={'ON' if f in flags else 'OFF'}" for f, s in _SWITCHES.items())])


def cpu_flags() -> set[str]:
    """Return the flags of this machine's first processor; nothing where /proc doesn't say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return set(next(line.partition(":")[2].split() for line in lines if line.startswith("flags")))
    except (OSError, StopIteration):
        return set()


def last_error(stderr: str) -> str:
    """Return the most telling line of a failed command: its last error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error") or "Error:" in line]
    return (errors or lines or ["no message"])[-1][:300]


if __name__ == "__main__":
    main(sys.argv[1:])
