"""Verify and load bundles in a process of their own: what an engine does to it can't take the tests along.

    python -m tests.runtime.damaged_child BUNDLE…

prints one JSON line per bundle: exit code and stderr of `edgepipe verify`, what `load` raised, and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import EdgepipeError
from edgepipe.runtime import load

ADDRESS_SPACE = 4 << 30  # bytes: Python with onnxruntime takes less than one


def loading(bundle: str) -> str:
    """Return how loading ends: "loaded", "refused" or the name of an error that should not come out."""
    try:
        load(bundle, threads=1)
    except EdgepipeError:
        return "refused"
    except BaseException as error:  # a panic of tokenizers is no Exception
        return repr(error)[:300]
    return "loaded"


def peak_bytes() -> int:
    """Return the most memory this process had; getrusage would count that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for bundle in sys.argv[1:]:
        result = CliRunner().invoke(main, ["verify", bundle])
        known = result.exception is None or isinstance(result.exception, SystemExit)
        outcome = {
            "bundle": bundle,
            "code": result.exit_code if known else repr(result.exception)[:300],
            "stdout": result.stdout,
            "stderr": result.stderr,
            "load": loading(bundle),
            "peak_bytes": peak_bytes(),
        }
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()
