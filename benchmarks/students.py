"""Does an encoder-decoder pay?  2/3–1/3 encoder-decoder beside its decoder-only twin, through our own bundles.

    python benchmarks/students.py [--blocks 4]     run, store results/students.json, rewrite docs/distill.md
    python benchmarks/students.py --page-only      rewrite the tables from the stored run

Both have the same width, heads and FFN, and as many parameters as whole layers allow; weights are random, which time
doesn't see. Batch 1, a KV cache on both sides, 32 output tokens, float32 and 4-bit bundles, a vocabulary of 8,192 and
the teacher's 49,152. Every figure comes from `measure_bundles`, the clock of `edgepipe measure --against`: processes
that take turns, ratios with intervals. Source of the claim: arXiv:2501.16273.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import Json
from edgepipe.calibration import open_text
from edgepipe.measuring.run import Plan, measure_bundles
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.sources import open_model
from edgepipe.students.config import StudentConfig, parameters, twin, with_layers
from edgepipe.students.files import make_student
from edgepipe.students.models import Decoder, Student
from edgepipe.students.result import as_model, save
from edgepipe.students.tokenizer import with_end_token

NAME = "students"
PAGE = ROOT / "docs" / "distill.md"
TOKENIZER = "smollm2-135m"  # whose first tokens are the vocabulary
VOCABULARIES = (8192, 49152)
STORED = {"float32": (), "4-bit": (("quantize", "bits", 4),)}
LENGTHS = (128, 512, 1024, 2048)  # of the source, or prompt
HEADLINE = 512
OUTPUT = 32
ENCODER_LAYERS, DECODER_LAYERS = 8, 4
BLOCK: Json = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1600,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "num_hidden_layers": ENCODER_LAYERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name one comparison."""

    vocabulary: int
    stored: str
    length: int


# The headline for both vocabularies, and a curve over the length for the small one.
CASES = tuple(
    Case(vocabulary=vocabulary, stored=stored, length=length)
    for vocabulary in VOCABULARIES
    for stored in STORED
    for length in (LENGTHS if vocabulary == VOCABULARIES[0] else (HEADLINE,))
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare an encoder-decoder with its decoder-only twin.")
    parser.add_argument("--blocks", type=int, default=4, help="fresh processes per bundle (default: 4)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from the stored run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        write_result(NAME, measure(options.blocks))
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(
        json.dumps(
            {title(row): [short(row["ratios"][name]) for name in ("ttft_ms", "token_ms")] for row in rows(result)}
        )
    )


def measure(blocks: int) -> Json:
    """Build all bundles, then measure every case."""
    came_from = provenance()
    folder = ROOT / "runs" / NAME
    models = {vocabulary: make_models(vocabulary, folder) for vocabulary in VOCABULARIES}
    bundles = {
        (vocabulary, stored, kind): build(path, stored, folder)
        for vocabulary, made in models.items()
        for kind, (path, _) in made.items()
        for stored in STORED
    }
    text = open_text("prose-eval", purpose="evaluation")
    found = []
    for number, case in enumerate(CASES, start=1):
        print(f"case {number} of {len(CASES)}: {case}", file=sys.stderr, flush=True)
        sides = {
            side: bundles[case.vocabulary, case.stored, kind]
            for side, kind in (("baseline", "decoder"), ("bundle", "encoder-decoder"))
        }
        plan = Plan(threads=0, blocks=blocks, turns=4, tokens=0, prompt=case.length, output=OUTPUT)
        figures = measure_bundles(sides, text, plan, progress=lambda _what, _done, _total: None)
        found.append(case_row(case, figures))
    return {
        **came_from,
        "command": ["python", "benchmarks/students.py", "--blocks", str(blocks)],
        "block": BLOCK,
        "models": {str(v): {kind: count for kind, (_, count) in made.items()} for v, made in models.items()},
        "layers": {"encoder-decoder": [ENCODER_LAYERS, DECODER_LAYERS], "decoder": layers_of_twins()},
        "output_tokens": OUTPUT,
        "machine": figures["machine"],
        "method": figures["method"],
        "cases": found,
    }


def student(vocabulary: int) -> StudentConfig:
    """Return the encoder-decoder of one vocabulary."""
    stack = {**BLOCK, "vocab_size": vocabulary}
    return StudentConfig(
        kind="encoder-decoder", encoder=stack, decoder=with_layers(stack, range(DECODER_LAYERS)), tie_embeddings=True
    )


def layers_of_twins() -> Json:
    """Return the layers of the decoder-only twins."""
    return {str(vocabulary): twin(student(vocabulary))["num_hidden_layers"] for vocabulary in VOCABULARIES}


def make_models(vocabulary: int, folder: Path) -> dict[str, tuple[Path, int]]:
    """Write the pair of one vocabulary as model directories; return where, and their parameters."""
    donor = open_model(TOKENIZER).info
    files = first_tokens(donor.tokenizer, vocabulary)
    ended = with_end_token(files, min(donor.eos_token_ids))
    config = student(vocabulary)
    made: dict[str, tuple[Student, dict[str, bytes]]] = {
        "encoder-decoder": (make_student(config), ended),
        "decoder": (make_student(twin(config)), files),
    }
    written = {}
    for kind, (module, tokenizer) in made.items():
        path = folder / f"{kind}-{vocabulary}"
        save(as_model(module, donor, name=path.name, tokenizer=tokenizer), path)
        count = parameters(config) if not isinstance(module, Decoder) else sum(p.numel() for p in module.parameters())
        written[kind] = (path, count)
    return written


def first_tokens(files: Any, count: int) -> dict[str, bytes]:
    """Return tokenizer files with the first `count` tokens: of a BPE these are special tokens, bytes, common merges."""
    rules = json.loads(files["tokenizer.json"])
    rules["model"]["vocab"] = {token: number for token, number in rules["model"]["vocab"].items() if number < count}
    known = rules["model"]["vocab"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in rules["model"]["merges"]]
    rules["model"]["merges"] = [pair for pair in merges if all(part in known for part in (*pair, "".join(pair)))]
    return {**files, "tokenizer.json": json.dumps(rules, ensure_ascii=False).encode()}


def build(model: Path, stored: str, folder: Path) -> Path:
    """Send a model down the river of one storage and return its bundle."""
    stages = [*(["quantize"] if STORED[stored] else []), "export", "compile"]
    recipe_file = folder / f"{stored}.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    context = max(LENGTHS) + 2 * OUTPUT
    settings: list[tuple[str, str, object]] = [("export", "context", context), *STORED[stored]]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    out = folder / f"{model.name}-{stored}"
    run(open_model(str(model)), recipe, out=out, runs=folder / "runs", fresh=False, listener=Progress())
    return out


def case_row(case: Case, figures: Json) -> Json:
    """Return what is kept of a measurement: medians, ratios with intervals, limits, bytes."""
    kept = ("ttft_ms", "token_ms", "tokens_per_second", "intervals", "spread", "flagged", "limits", "bundle_bytes")
    sides = {
        name: {key: figures[side].get(key) for key in kept}
        for name, side in (("decoder", "baseline"), ("encoder-decoder", "bundle"))
    }
    return {
        "vocabulary": case.vocabulary,
        "stored": case.stored,
        "length": case.length,
        "sides": sides,
        "ratios": figures["ratios"],
    }


def rows(result: Json) -> list[Json]:
    """Return the cases in the order of the tables."""
    return sorted(result["cases"], key=lambda row: (row["vocabulary"], row["stored"] != "float32", row["length"]))


def title(row: Json) -> str:
    """Name a case."""
    return f"{row['stored']}, {row['vocabulary']:,} tokens, {row['length']} in"


def short(ratio: Json) -> str:
    """Write a ratio, with its interval."""
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def page_section(result: Json) -> str:
    """Return the table of the page."""
    cells = []
    for row in rows(result):
        decoder, pair = (row["sides"][name] for name in ("decoder", "encoder-decoder"))
        cells.append(
            [
                f"{row['vocabulary']:,}",
                row["stored"],
                str(row["length"]),
                f"{decoder['ttft_ms']:.0f}",
                f"{pair['ttft_ms']:.0f}",
                short(row["ratios"]["ttft_ms"]),
                f"{decoder['token_ms']:.1f}",
                f"{pair['token_ms']:.1f}",
                short(row["ratios"]["token_ms"]),
                limited(pair),
            ]
        )
    header = (
        *("vocabulary", "stored", "tokens in", "TTFT, decoder, ms", "encoder-decoder, ms", "ratio"),
        *("ms/token, decoder", "encoder-decoder", "ratio", "limited by (first token, next)"),
    )
    machine = result["machine"]
    counts = "; ".join(
        f"{int(vocabulary):,} tokens: {made['encoder-decoder'] / 1e6:.1f} and {made['decoder'] / 1e6:.1f} million"
        for vocabulary, made in result["models"].items()
    )
    flagged = sum(bool(side["flagged"]) for row in result["cases"] for side in row["sides"].values())
    return (
        f"{markdown_table(header, cells)}\n\n"
        f"{counted(result)}\n\n"
        "Ratios are encoder-decoder ÷ decoder-only with 95 % intervals. On a shared machine samples spread: by more "
        f"than 10 % in {flagged} of {2 * len(result['cases'])} sides. "
        f"Parameters, encoder-decoder and twin, {counts}. "
        f"{machine['cpu']}, {machine['cores']} cores seen, threads: one per physical core, onnxruntime "
        f"{machine['versions']['onnxruntime']}, commit `{result['commit'][:12]}`, {result['date']}."
    )


def counted(result: Json) -> str:
    """Return the table of what no clock blurs: multiply-adds until the first token, bytes read for a later one."""
    cells = []
    for row in rows(result):
        decoder, pair = (row["sides"][name] for name in ("decoder", "encoder-decoder"))
        adds = [side["limits"]["prefill"]["multiply_adds"] for side in (decoder, pair)]
        read = [side["limits"]["token"]["bytes"] for side in (decoder, pair)]
        cells.append(
            [
                f"{row['vocabulary']:,}",
                row["stored"],
                str(row["length"]),
                *(f"{count / 1e9:.1f}" for count in adds),
                f"{adds[1] / adds[0]:.2f}",
                *(f"{count / 1e6:.1f}" for count in read),
                f"{read[1] / read[0]:.2f}",
                *(f"{side['bundle_bytes'] / 1e6:.1f}" for side in (decoder, pair)),
            ]
        )
    header = (
        *(
            "vocabulary",
            "stored",
            "tokens in",
            "10⁹ multiply-adds to the first token, decoder",
            "encoder-decoder",
            "ratio",
        ),
        *("MB read for a next token, decoder", "encoder-decoder", "ratio", "bundle, MB, decoder", "encoder-decoder"),
    )
    return markdown_table(header, cells)


def limited(side: Json) -> str:
    """Say what limits the first token and the ones after it."""
    limits = side.get("limits") or {}
    return ", ".join(limits[key]["limited_by"] for key in ("prefill", "token") if key in limits) or "not known"


if __name__ == "__main__":
    main(sys.argv[1:])
