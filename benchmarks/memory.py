"""Watch the memory of a process that runs a bundle, step by step: the figures of docs/runtime.md. Linux only.

    python benchmarks/memory.py              build bundles, run, store results/memory.json, rewrite the page's table
    python benchmarks/memory.py --page-only  rewrite the table from the stored run

Each bundle runs in a process of its own that imports the runtime and nothing else. Resident memory is split as the
kernel splits it: pages of files (libraries, the mapped weights) and pages that belong to the process alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result

NAME = "memory"
PAGE = ROOT / "docs" / "runtime.md"
BUNDLES = {"default": (), "`compile.cache_dtype=float32`": ("--set", "compile.cache_dtype=float32")}
CALLERS = 4
SENTENCE = "The water rose a little every day, and nobody on the hill said anything about it. "


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Watch the memory of a running bundle.")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(watch(options.child)))
        return
    if not options.page_only:
        write_result(NAME, measure())
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({title: steps[-1] for title, steps in result["bundles"].items()}))


def measure() -> dict[str, Any]:
    """Build each bundle, and watch it in a fresh process."""
    came_from = provenance()
    found = {}
    sizes = {}
    for number, (title, flags) in enumerate(BUNDLES.items()):
        folder = ROOT / "runs" / NAME / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
        command = [sys.executable, "-m", "edgepipe", "compress", "--recipe", "recipe.toml", "--out", "bundle", *flags]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        child = [sys.executable, __file__, "--child", str(folder / "bundle")]
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
        found[title] = json.loads(done.stdout.strip().splitlines()[-1])
        manifest = json.loads((folder / "bundle" / "manifest.json").read_text(encoding="utf-8"))
        sizes[title] = {"weight_bytes": manifest["weights"]["bytes"], "cache_bytes": manifest["cache"]["bytes"]}
    return {**came_from, "bundles": found, "sizes": sizes}


def watch(bundle: Path) -> list[dict[str, Any]]:
    """Load and use a bundle; return the process's memory in bytes after each step."""
    from edgepipe.runtime import load

    steps = [_memory("runtime imported")]
    model = load(bundle, callers=CALLERS)
    steps.append(_memory("bundle loaded"))
    model.generate(SENTENCE, max_new_tokens=16, ignore_eos=True)
    steps.append(_memory("one short answer"))
    per_sentence = len(model.encode(SENTENCE))
    long = SENTENCE * ((model.context - 64) // per_sentence)
    model.generate(long, max_new_tokens=32, ignore_eos=True)
    steps.append(_memory(f"a prompt that fills the context of {model.context}"))
    threads = [
        threading.Thread(target=model.generate, args=(f"{number}. {long}",), kwargs={"max_new_tokens": 8})
        for number in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps.append(_memory(f"{CALLERS} such callers at once"))
    return steps


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from a stored run alone."""
    rows = []
    for title, steps in result["bundles"].items():
        for step in steps:
            figures = [f"{step[key] / 1e6:.0f}" for key in ("own", "files", "resident", "peak")]
            rows.append([title, step["after"], *figures])
    sizes = "; ".join(
        f"{title}: weights {size['weight_bytes'] / 1e6:.1f} MB, cache {size['cache_bytes'] / 1e6:.1f} MB when full"
        for title, size in result["sizes"].items()
    )
    return "\n\n".join(
        [
            markdown_table(("bundle", "after", "own, MB", "files, MB", "resident, MB", "peak so far, MB"), rows),
            f"SmolLM2-135M-Instruct. {sizes}. onnxruntime {result['versions']['onnxruntime']}, commit "
            f"`{result['commit'][:12]}`, {result['date']}.",
        ]
    )


def _memory(after: str) -> dict[str, Any]:
    """Read what Linux says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    status = {
        key: 1024 * int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    own, files = status["RssAnon"], status["RssFile"] + status["RssShmem"]
    return {"after": after, "own": own, "files": files, "resident": status["VmRSS"], "peak": status["VmHWM"]}


if __name__ == "__main__":
    main(sys.argv[1:])
