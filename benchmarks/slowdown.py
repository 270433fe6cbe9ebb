"""Can the measuring method tell a planted slowdown from none?  Trials of `edgepipe measure --against`.

    python benchmarks/slowdown.py [--trials 20] [--share 0.1] [--seed 0]   run, store results/slowdown.json
    python benchmarks/slowdown.py --bundle DIRECTORY                       on this bundle instead of a small random one

Every trial measures one bundle against itself, the way the command does. In half of the trials, drawn by the seed, one
side's worker takes longer by the share (slowed_worker.py); a trial is right when the verdict on the time per output
token is "worse" then, and "tie" otherwise. The small bundle is a random Llama of some million parameters, made here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.stored import provenance, write_result
from edgepipe.calibration import open_text
from edgepipe.measuring.figures import ratios
from edgepipe.measuring.run import Plan, describe_machine, take_blocks

NAME = "slowdown"
PLAN = Plan(threads=0, blocks=6, turns=2, tokens=0)
SLOWED_WORKER = ("-P", str(Path(__file__).with_name("slowed_worker.py")))
CONTEXT = 256  # prompts of 32, 128 and 176 tokens: a trial is about output tokens
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
}


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Tell a planted slowdown from none.")
    parser.add_argument("--trials", type=int, default=20, help="trials, half of them slowed (default: 20)")
    parser.add_argument("--share", type=float, default=0.1, help="how much longer a slowed run takes (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of which trials are slowed (default: 0)")
    parser.add_argument("--bundle", type=Path, help="a bundle to measure, in place of the small random one")
    options = parser.parse_args(arguments)
    if options.trials < 2 or options.share <= 0:
        parser.error("--trials must be at least 2 and --share above 0")
    came_from = provenance()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgepipe-slowdown-") as folder:
        bundle = options.bundle or make_bundle(Path(folder))
        trials = run_trials(bundle, Path(folder), options.trials, options.share, options.seed)
    result = {
        **came_from,
        "command": ["python", "benchmarks/slowdown.py", *arguments],
        "machine": describe_machine(PLAN.threads),
        "bundle": "a small random one" if options.bundle is None else options.bundle.name,
        "share": options.share,
        "seed": options.seed,
        "blocks": PLAN.blocks,
        "turns": PLAN.turns,
        "seconds": round(time.perf_counter() - begun, 1),
        "right": sum(trial["right"] for trial in trials),
        "trials": trials,
    }
    stored = write_result(NAME, result)
    summary = {"right": result["right"], "trials": len(trials), "seconds": result["seconds"], "stored": stored.name}
    print(json.dumps(summary))


def run_trials(bundle: Path, folder: Path, count: int, share: float, seed: int) -> list[dict[str, Any]]:
    """Return one record per trial: what was planted, what the method said, and the raw samples of both sides."""
    slowed = [number < count // 2 for number in range(count)]
    random.Random(seed).shuffle(slowed)
    text = folder / "text.txt"
    text.write_text(open_text("prose-eval"), encoding="utf-8")
    return [run_trial(bundle, text, share if planted else 0.0, number) for number, planted in enumerate(slowed)]


def run_trial(bundle: Path, text: Path, share: float, number: int) -> dict[str, Any]:
    """Measure a bundle against itself, one side slowed by `share`."""
    programs = {"bundle": (*SLOWED_WORKER, str(share))} if share else {}
    sides = {"baseline": bundle, "bundle": bundle}
    begun = time.perf_counter()
    samples = take_blocks(sides, text, PLAN, lambda _: None, programs)
    found = ratios(samples["bundle"], samples["baseline"])["token_ms"]
    right = found["verdict"] == ("worse" if share else "tie")
    print(
        f"trial {number + 1}: planted {share:.0%}, found {found['value']:.3f} "
        f"[{found['low']:.3f}, {found['high']:.3f}] {found['verdict']}: {'right' if right else 'WRONG'}, "
        f"{time.perf_counter() - begun:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    kept = {
        name: [{key: _rounded(block[key]) for key in ("token_ms", "index_ms")} for block in blocks]
        for name, blocks in samples.items()
    }
    return {"planted": share, "ratio": found, "right": right, "samples": kept}


def make_bundle(folder: Path) -> Path:
    """Compress a small random Llama to 4 bits."""
    from edgepipe.compress import compress
    from edgepipe.recipe import resolve
    from edgepipe.report.progress import Progress
    from tests.tiny_models import save_tiny_model

    model = save_tiny_model(folder / "small-llama", "llama", **SMALL)
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=recipe_file, settings=[("export", "context", CONTEXT)])
    summary = compress(str(model), recipe, listener=Progress(), out=folder / "bundle", runs=folder / "runs")
    return Path(summary["bundle"])


def _rounded(turns: list[list[float]]) -> list[list[float]]:
    return [[round(time, 3) for time in turn] for turn in turns]


if __name__ == "__main__":
    main(sys.argv[1:])
