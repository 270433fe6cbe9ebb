"""Trim SmolLM2's vocabulary to some data, and set each bundle beside the untrimmed one: the table of docs/trim.md.

    python benchmarks/trim.py [--data FILE]   run, store results/trim.json, rewrite the page's table
    python benchmarks/trim.py --page-only     rewrite the table from the stored run

FILE is the dev set of the E2E challenge (default: e2e-dev.csv in the folder that EDGEPIPE_DATA names). Each trimmed
bundle takes turns with the untrimmed one, both at 4 bits. Finished bundles stay in runs/trim.

A last one is trimmed to the first four fifths of FILE; of the texts of the rest, those whose tokens are all kept must
have the logits that the untrimmed bundle gives these tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.rows import open_data, read_texts
from edgepipe.runtime import Model, load
from edgepipe.sources import open_model
from edgepipe.stages.measure import Measure
from edgepipe.students.trimming import trim

NAME = "trim"
PAGE = ROOT / "docs" / "trim.md"
MODEL = "smollm2-135m"
HEADER = (
    *("data", "tokens", "always kept", "coverage, %", "tokens/word before", "after"),
    *("bundle, MB", "head, MB/token", "ms/token", "ms/token untrimmed", "ratio"),
)
_PART = "embedding and head"
_HELD_OUT = 5  # one in so many rows is held out, the last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Name what the vocabulary is trimmed to."""

    data: str  # "E2E": the file given; else a file, or the name of a shipped text
    size: int = 0  # tokens at most, 0: all that are used


VARIANTS = (
    Variant(data="E2E"),
    Variant(data="E2E", size=1024),
    Variant(data="prose-eval"),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Trim a vocabulary and measure what that gives.")
    folder = Path(os.environ.get("EDGEPIPE_DATA", "."))
    parser.add_argument("--data", type=Path, default=folder / "e2e-dev.csv", help="the dev set of the E2E challenge")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        write_result(NAME, measure(options.data))
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({f"{row['data']} {row['size']}": row["ratio"]["value"] for row in result["rows"]}))


def measure(data: Path) -> dict[str, Any]:
    """Build every bundle and measure it in turn with the untrimmed one."""
    came_from = provenance()
    whole = build(None, data)
    rows = []
    for variant in VARIANTS:
        bundle = build(variant, data)
        file = open_data(str(data) if variant.data == "E2E" else variant.data, "trimming")
        _, kept = trim(open_model(MODEL), read_texts(file), variant.size or None)
        figures = Measure(tokens=0).figures(
            {"baseline": whole.path, "bundle": bundle.path}, default_threads=0, progress=lambda *_: None
        )
        rows.append(
            {
                "data": variant.data,
                "size": variant.size,
                "sha256": file.sha256,
                "tokens": len(kept.old_ids),
                "permanent": kept.permanent,
                "coverage": kept.coverage,
                "words": kept.words,
                "tokens_before": kept.tokens_before,
                "tokens_after": kept.tokens_after,
                "head_bytes": head_bytes(bundle),
                "ratio": figures["ratios"]["token_ms"],
                "figures": figures,
            }
        )
        print(f"{variant}: {rows[-1]['ratio']}", file=sys.stderr, flush=True)
    return {
        **came_from,
        "model": MODEL,
        "file": data.name,
        "tokens": whole.manifest["model"]["vocab_size"],
        "head_bytes": head_bytes(whole),
        "rows": rows,
        "held_out": held_out(whole, data),
    }


def held_out(whole: CompiledModel, data: Path) -> dict[str, Any]:
    """Compare logits on texts that the vocabulary wasn't trimmed to; of the untrimmed bundle those of kept tokens."""
    with data.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    cut = len(rows) - len(rows) // _HELD_OUT
    first = ROOT / "runs" / NAME / "first.csv"
    with first.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows[:cut]])
    bundle = build(Variant(data=str(first)), data)
    _, kept = trim(open_model(MODEL), read_texts(open_data(str(first), "trimming")), None)
    before, after = load(whole.path), load(bundle.path)
    assert isinstance(before, Model)
    assert isinstance(after, Model)
    texts = list(dict.fromkeys(row[1] for row in rows[cut:]))
    known, same, worst, tokens = set(kept.old_ids.tolist()), 0, 0.0, 0
    inside = [text for text in texts if known.issuperset(before.tokenizer.encode(text))]
    for text in inside:
        ids = after.tokenizer.encode(text)
        assert kept.old_ids[ids].tolist() == before.tokenizer.encode(text)
        expected, got = before.logits(text)[:, kept.old_ids], after.logits(text)
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        same += int((got.argmax(axis=1) == expected.argmax(axis=1)).sum())
        tokens += len(ids)
    found = {"texts": len(texts), "inside": len(inside), "tokens": tokens}
    return {**found, "same_token": same, "largest_error": worst}


def build(variant: Variant | None, data: Path) -> CompiledModel:
    """Send the model down the river, trimmed or not."""
    folder = ROOT / "runs" / NAME / ("whole" if variant is None else f"{Path(variant.data).stem}-{variant.size}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    settings: list[tuple[str, str, object]] = []
    if variant is not None:
        file = str(data) if variant.data == "E2E" else variant.data
        settings = [("trim", "data", file), ("trim", "size", variant.size)]
    before = [] if variant is None else ["trim"]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings, before=before)
    made = run(open_model(MODEL), recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def head_bytes(bundle: CompiledModel) -> int:
    """Return the bytes of the table that serves as embedding and head: every token reads all of it for its logits."""
    return sum(part["bytes"] for part in bundle.manifest["weights"]["parts"] if part["part"] == _PART)


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from a stored run alone."""
    untrimmed = [row["figures"]["baseline"] for row in result["rows"]]
    cells = [
        [
            *("untrimmed", f"{result['tokens']:,}", "", "", "", "", f"{untrimmed[0]['bundle_bytes'] / 1e6:.1f}"),
            *(f"{result['head_bytes'] / 1e6:.1f}", "", "", ""),
        ]
    ]
    for row, before in zip(result["rows"], untrimmed, strict=True):
        after, ratio = row["figures"]["bundle"], row["ratio"]
        cells.append(
            [
                row["data"] + (f", at most {row['size']:,}" if row["size"] else ""),
                f"{row['tokens']:,}",
                f"{row['permanent']:,}",
                f"{100 * row['coverage']:.2f}",
                f"{row['tokens_before'] / row['words']:.3f}",
                f"{row['tokens_after'] / row['words']:.3f}",
                f"{after['bundle_bytes'] / 1e6:.1f}",
                f"{row['head_bytes'] / 1e6:.1f}",
                f"{after['token_ms']:.1f}",
                f"{before['token_ms']:.1f}",
                f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            ]
        )
    machine = result["rows"][0]["figures"]["machine"]
    said = (
        f"{result['model']} at 4 bits, its embedding at 8; E2E is `{result['file']}`, all columns; ms/token is the "
        "median, the ratio that of the fastest tokens of bursts that took turns, with its 95 % interval. "
        f"{machine['cpu']}, {machine['cores']} cores seen, onnxruntime {result['versions']['onnxruntime']}, commit "
        f"`{result['commit'][:12]}`, {result['date']}; load average at the start {result['load_average_1min']:.1f}."
    )
    held = result["held_out"]
    kept = (
        f"Trimmed to the first four fifths of E2E, {held['inside']} of {held['texts']} further texts keep all of their "
        f"tokens. After {held['same_token']:,} of these {held['tokens']:,} both bundles find the same kept token the "
        f"likeliest; logits differ by {held['largest_error']:.0e} of the largest at most."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}\n\n{kept}"


if __name__ == "__main__":
    main(sys.argv[1:])
