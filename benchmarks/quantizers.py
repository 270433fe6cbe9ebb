"""Compare the methods that choose a weight's codes by STS-B, through real bundles: a table of docs/quantize.md.

    python benchmarks/quantizers.py --data FILE    run what isn't stored yet, store results/quantizers.json, show it
                                    --arm NAME     … of this row alone, "gptq 4"; may be given several times
    python benchmarks/quantizers.py --page-only    rewrite the table from what is stored

FILE holds pairs of sentences with a score that people gave, such as the dev set of STS-B. Methods are judged on
all-MiniLM-L6-v2, which comes in float32; SmolLM2 comes on a 4-bit grid. Each row is stored as soon as it is scored, and
one that is stored with the settings it has now isn't run again. Needs the extra `quantize`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.sources import open_model
from edgepipe.store import versions

NAME = "quantizers"
PAGE = ROOT / "docs" / "quantize.md"
MODEL = "minilm-l6-v2"
GROUP = 32
THREADS = 1
PACKAGES = ("auto-round", "neural-compressor-pt", "onnxruntime", "torch", "transformers")
HEADER = ("method", "grid", "bits/weight of the layers", "bundle, MB", "Spearman × 100", "against float32", "minutes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one way to choose codes; no bits: not compressed."""

    method: str = ""
    bits: int = 0
    symmetric: bool = True

    @property
    def name(self) -> str:
        """Return what a row is called."""
        return f"{self.method} {self.bits}{'' if self.symmetric else ' zero points'}" if self.bits else "float32"


ARMS = (
    Arm(),
    *(Arm(method=method, bits=2) for method in ("rtn", "gptq", "awq", "autoround")),
    *(Arm(method=method, bits=4) for method in ("rtn", "gptq", "awq", "autoround")),
    *(Arm(method=method, bits=bits, symmetric=False) for bits in (2, 4) for method in ("rtn", "gptq", "hqq")),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare methods that choose a weight's codes.")
    parser.add_argument("--data", type=Path, help="pairs of sentences with a score, .tsv")
    parser.add_argument("--arm", action="append", help="a row to run (default: all)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None:
            parser.error("--data FILE is needed")
        names = [arm.name for arm in ARMS]
        if unknown := [name for name in options.arm or () if name not in names]:
            parser.error(f"--arm {unknown[0]}: expected one of {', '.join(names)}")
        take(options.data, options.arm or names)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["arm"]: row["spearman"]["value"] for row in result["rows"]}))


def take(data: Path, names: list[str]) -> None:
    """Run every named arm that isn't stored as it is now, and store each as soon as it is scored."""
    result: Json = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    for arm in (next(arm for arm in ARMS if arm.name == name) for name in names):
        kept = [row for row in result["rows"] if row["arm"] != arm.name]
        if any(row["arm"] == arm.name and row["settings"] == settings_of(arm) for row in result["rows"]):
            continue
        print(arm.name, file=sys.stderr, flush=True)
        row = {"arm": arm.name, "settings": settings_of(arm), "provenance": provenance(), **taken(arm, data)}
        order = [one.name for one in ARMS]
        result = {
            "model": MODEL,
            "packages": versions(PACKAGES),
            "rows": sorted(
                [*kept, row], key=lambda one: order.index(one["arm"]) if one["arm"] in order else len(order)
            ),
        }
        write_result(NAME, result)


def settings_of(arm: Arm) -> Json:
    """Return an arm's options of the stage quantize; the embedding stays at 8 bits."""
    if not arm.bits:
        return {}
    return {"method": arm.method, "bits": arm.bits, "group": GROUP, "symmetric": arm.symmetric}


def taken(arm: Arm, data: Path) -> Json:
    """Build an arm's bundle and score it; finished bundles stay in runs/quantizers."""
    started = time.perf_counter()
    bundle = build(arm)
    minutes = (time.perf_counter() - started) / 60
    found = evaluate(bundle.path, str(data), Evaluation(metric="spearman", threads=THREADS), listener=Progress())
    parts = bundle.manifest["weights"]["parts"]
    layers = [part for part in parts if part["storage"].startswith(f"q{arm.bits} ")] if arm.bits else parts
    return {
        "spearman": {key: found[key] for key in ("value", "interval", "count")},
        "data": {**found["data"], "name": data.name},
        "machine": found["machine"],
        "notes": [note for record in bundle.history if record.stage == "quantize" for note in record.notes],
        "layers": {"parameters": sum(p["parameters"] for p in layers), "bytes": sum(p["bytes"] for p in layers)},
        "bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "minutes": minutes,
    }


def build(arm: Arm) -> CompiledModel:
    """Send the model down the river of one arm."""
    folder = ROOT / "runs" / NAME / arm.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    stages = ["quantize", "export", "compile"] if arm.bits else ["export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    model = open_model(MODEL)
    if not arm.bits:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    settings: list[tuple[str, str, object]] = [("quantize", name, value) for name, value in settings_of(arm).items()]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    made = run(model, recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from what is stored alone."""
    rows = {row["arm"]: row for row in result["rows"]}
    whole = rows[Arm().name]["spearman"]["value"]
    cells = []
    for arm in ARMS:
        if arm.name not in rows:
            continue
        row = rows[arm.name]
        value, layers = row["spearman"]["value"], row["layers"]
        low, high = row["spearman"]["interval"]
        cells.append(
            [
                arm.method or "float32",
                f"{arm.bits} bits, {'symmetric' if arm.symmetric else 'zero points'}" if arm.bits else "",
                f"{8 * layers['bytes'] / layers['parameters']:.2f}",
                f"{row['bundle_bytes'] / 1e6:.1f}",
                f"{100 * value:.2f} ({100 * low:.2f} to {100 * high:.2f})",
                f"{100 * (value - whole):+.2f}" if arm.bits else "",
                f"{row['minutes']:.1f}",
            ]
        )
    first = rows[Arm().name]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(result["packages"].items()))
    commits = sorted({row["provenance"]["commit"][:12] for row in rows.values()})
    dates = sorted({row["provenance"]["date"] for row in rows.values()})
    said = (
        f"{result['model']}, groups of {GROUP}, embedding at 8 bits, calibrated on `everyday`; "
        f"{first['spearman']['count']} pairs of `{first['data']['name']}` through the bundles, 95 % intervals by "
        f"bootstrap over pairs. Minutes are those from source to bundle on a busy machine: a bound. "
        f"{first['machine']['cpu']}, {packages}, commit "
        f"{', '.join(f'`{one}`' for one in commits)}, {dates[-1]}."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
