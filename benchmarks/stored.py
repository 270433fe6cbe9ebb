"""Keep a benchmark's result: where it came from, the JSON under results/, and the tables pages show of it.

A page marks the place of a table with `<!-- NAME: begin -->` and `<!-- NAME: end -->`; the benchmark rewrites what lies
between, and a test compares it with the stored run. So no figure in a page is typed by hand.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgepipe.store import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """Return commit, date, versions and how busy the machine is now: what a reader needs to judge a result."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "load_average_1min": os.getloadavg()[0],  # beside ours at the start: near 0 on a quiet machine
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_result(name: str) -> dict[str, Any]:
    """Read results/NAME.json."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def section(page: Path, name: str) -> str:
    """Return what stands between a page's two marks; ValueError when they are missing."""
    found = _marks(name).search(page.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{page} has no <!-- {name}: begin --> and <!-- {name}: end -->")
    return found[2].strip()


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between a page's two marks; ValueError when they are missing."""
    section(page, name)
    new = _marks(name).sub(lambda m: f"{m[1]}\n\n{text.strip()}\n\n{m[3]}", page.read_text(encoding="utf-8"))
    page.write_text(new, encoding="utf-8")


def spread(values: Sequence[float], digits: int) -> str:
    """Write a mean, and where there are several values the least and the most."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown; columns after the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)}: begin -->)(.*?)(<!-- {re.escape(name)}: end -->)", re.DOTALL)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def without_folders(sentence: str) -> str:
    """Return a sentence that names files by name alone, not by where one machine has them."""
    return re.sub(r"(?<!\S)/\S*/", "", sentence)
