"""Count the operators that onnxruntime really runs, by its profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import onnxruntime as ort

_T = TypeVar("_T")


def profiled(opening: Callable[[], _T], use: Callable[[_T], object]) -> tuple[Counter[str], _T]:
    """Open something whose sessions are profiled, use it; return operators that ran, by name, and what was opened."""
    sessions: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:

        class Profiled(ort.InferenceSession):  # type: ignore[misc]
            def __init__(self, file: str, options: ort.SessionOptions, **given: Any) -> None:
                options.enable_profiling = True
                options.profile_file_prefix = f"{Path(folder) / Path(file).stem}"
                super().__init__(file, options, **given)
                sessions.append(self)

        with patch.object(ort, "InferenceSession", Profiled):
            opened = opening()
        use(opened)
        traces = [Path(session.end_profiling()).read_text(encoding="utf-8") for session in sessions]
    events = [event for trace in traces for event in json.loads(trace)]
    kernels = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    return Counter(event["args"]["op_name"] for event in kernels), opened
