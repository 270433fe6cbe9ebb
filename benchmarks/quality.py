"""Compare grids by perplexity, scored through real bundles: the figures of docs/quantize.md.

    python benchmarks/quality.py --data FILE [--windows 8]   run what isn't stored, store results/quality.json, show it
    python benchmarks/quality.py --page-only                 rewrite the table from what is stored

FILE is any UTF-8 text that no compression step has seen; the stored run names it by its sha256. The first windows ×
512 tokens are scored, each window from nothing. Each row is stored as soon as it is scored, and one that is stored for
the same text isn't run again; finished bundles stay in runs/quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, TorchModel
from edgepipe.measuring.quality import WINDOW_TOKENS, cut_windows, perplexity, score_windows
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.runtime import load
from edgepipe.sources import open_model
from edgepipe.store import file_sha256

NAME = "quality"
PAGE = ROOT / "docs" / "quantize.md"
MODEL = "smollm2-135m"
HEADER = ("layers", "embedding", "KV cache", "bits/weight", "MB of weights", "perplexity", "against float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Name one way to store the model, and the options of `quantize` that make it; None: not compressed."""

    layers: str
    embedding: str
    options: dict[str, object] | None
    cache: str = "float16"  # `compile.cache_dtype`

    @property
    def key(self) -> str:
        """Return a name that is fit for a folder."""
        text = f"{self.layers}-{self.embedding}" + ("" if self.cache == "float16" else f"-{self.cache}-cache")
        return "".join(c if c.isalnum() else "-" for c in text)


def _rtn(group: int, embedding: int, *, bits: int = 4, symmetric: bool = True) -> Variant:
    kind = "symmetric" if symmetric else "zero points"
    options: dict[str, object] = {"import": False, "bits": bits, "group": group, "symmetric": symmetric}
    return Variant(
        layers=f"{bits}-bit {kind}, group {group}",
        embedding=f"{embedding}-bit",
        options={**options, "embedding_bits": embedding},
    )


VARIANTS = (
    Variant(layers="float32", embedding="float32", options=None),
    Variant(layers="Q4_1 kept (default)", embedding="Q8_0 kept", options={}),
    Variant(layers="Q4_1 kept", embedding="Q8_0 kept", options={}, cache="int8"),
    Variant(layers="Q4_1 kept", embedding="4-bit symmetric", options={"embedding_bits": 4}),
    _rtn(32, 8, bits=8),
    *(_rtn(group, embedding) for group in (32, 64, 128) for embedding in (8, 4)),
    *(_rtn(32, embedding, symmetric=False) for embedding in (8, 4)),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare grids by perplexity.")
    parser.add_argument("--data", type=Path, help="a UTF-8 text")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW_TOKENS} tokens (default: 8)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None or options.windows < 1:
            parser.error("--data FILE is needed, and --windows must be at least 1")
        measure(options.data, options.windows)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({", ".join(named(row)): row["perplexity"] for row in result["rows"]}))


def measure(data: Path, windows: int) -> None:
    """Score every variant that isn't stored on the first windows × 512 tokens of a text, and store each one."""
    asked = {
        "model": MODEL,
        "data": {"name": data.name, "sha256": file_sha256(data)},
        "windows": windows,
        "window_tokens": WINDOW_TOKENS,
    }
    stored = read_result(NAME)
    if any(stored[name] != value for name, value in asked.items()):
        stored = {**provenance(), **asked, "rows": []}
    rows = {named(row): row for row in stored["rows"]}
    text = data.read_text(encoding="utf-8")
    source = open_model(MODEL)
    for variant in VARIANTS:
        name = (variant.layers, variant.embedding, variant.cache)
        if name not in rows:
            rows[name] = {**score(source, variant, text, windows), "provenance": provenance()}
            order = [(one.layers, one.embedding, one.cache) for one in VARIANTS]
            write_result(NAME, {**stored, "rows": [rows[one] for one in order if one in rows]})


def named(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is of; those stored before int8 caches have float16 ones."""
    return row["layers"], row["embedding"], row.get("cache", "float16")


def score(source: TorchModel, variant: Variant, text: str, windows: int) -> dict[str, Any]:
    """Build a variant's bundle and return its perplexity, with the summed log-probability of every window."""
    bundle = build(source, variant)
    model = load(bundle.path, callers=1)
    ids = model.encode(text)[: windows * WINDOW_TOKENS]
    scored = score_windows(model, cut_windows(ids, WINDOW_TOKENS))
    del model
    gc.collect()
    weights = bundle.manifest["weights"]
    row = {
        "layers": variant.layers,
        "embedding": variant.embedding,
        "cache": variant.cache,
        "options": variant.options,
        "perplexity": perplexity(scored),
        "tokens": int(scored[:, 1].sum()),
        "window_logprobs": (-scored[:, 0]).tolist(),
        "weight_bytes": weights["bytes"],
        "bits_per_weight": weights["bits_per_weight"],
    }
    print(f"{variant.layers}, embedding {variant.embedding}: {row['perplexity']:.3f}", file=sys.stderr, flush=True)
    return row


def build(source: TorchModel, variant: Variant) -> CompiledModel:
    """Send the model down the river of one variant; the numeric checks are the test suite's and `compress`'s."""
    folder = ROOT / "runs" / NAME / variant.key
    folder.mkdir(parents=True, exist_ok=True)
    stages = ["export", "compile"] if variant.options is None else ["quantize", "export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    settings: list[tuple[str, str, object]] = [("export", "check_tokens", 0), ("compile", "check_tokens", 0)]
    settings.append(("compile", "cache_dtype", variant.cache))
    settings += [("quantize", option, value) for option, value in (variant.options or {}).items()]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    model = source
    if variant.options is None:
        model = dataclasses.replace(source, weights=source.weights.as_float32())
    made = run(model, recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from a stored run alone."""
    rows = result["rows"]
    before = rows[0]["perplexity"]
    made = [row["provenance"] for row in rows if "provenance" in row] or [result]
    commits = sorted({one["commit"][:12] for one in [result, *made]})
    cells = [
        [
            *named(row),
            f"{row['bits_per_weight']:.2f}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.2f}",
            "" if row is rows[0] else f"{100 * (row['perplexity'] / before - 1):+.1f} %",
        ]
        for row in rows
    ]
    return "\n\n".join(
        [
            markdown_table(HEADER, cells),
            f"{result['model']}; the first {result['windows']} × {result['window_tokens']} tokens of "
            f"`{result['data']['name']}` (sha256 `{result['data']['sha256'][:12]}…`), {rows[0]['tokens']} of them "
            f"scored, through the bundles' own runtime with float32 arithmetic, as shipped. onnxruntime "
            f"{result['versions']['onnxruntime']}, commit {', '.join(f'`{one}`' for one in commits)}, "
            f"{max(one['date'] for one in made)}.",
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
