"""The child process of context.py: GRAPH SHIPPED HTP_ARCH SOC_MODEL; the provider's log goes to stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from edgepipe.errors import EdgepipeError


def main(words: list[str]) -> int:
    """Compile; return the exit code, with a sentence on stdout where it isn't 0."""
    from edgepipe.runtime.qnn import open_npu_session

    graph, shipped, htp_arch, soc_model = words
    try:
        open_npu_session(Path(graph), int(htp_arch), int(soc_model), None, context=Path(shipped))
    except EdgepipeError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
