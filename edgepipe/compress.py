"""Compress: the library function behind `edgepipe compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import CompiledModel, Json, Measured
from edgepipe.errors import StageError

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener
    from edgepipe.recipe import Recipe


def compress(
    model: str,
    recipe: Recipe,
    *,
    listener: Listener,
    out: Path | None = None,
    runs: Path = Path("runs"),
    fresh: bool = False,
    task: str | None = None,
) -> Json:
    """Compress MODEL by a recipe and return the summary: bundle path, bytes, bits per weight and what was measured.

    `runs` keeps finished stages, so that a run that was stopped, or one with the same beginning, needn't repeat them;
    `fresh` repeats them all. `task` overrides the task that the model's config describes. Raises ConfigError before any
    work begins, StageError or TargetError when a stage fails.
    """
    from edgepipe.pipeline import check_output, run, run_name
    from edgepipe.sources import open_model

    if out is not None:
        check_output(out)
    source = open_model(model, task)
    target = out if out is not None else runs / run_name(source, recipe) / "bundle"
    before = _manifest_sha256(target)
    report = runs / run_name(source, recipe) / "report.html"
    summary: Json = {}

    def finish(result: CompiledModel | Measured) -> None:
        """Sum up and write the page before another run may change what they speak of."""
        summary.update(_summary(result, before))
        if isinstance(result, Measured):
            summary["over_budget"] = over_budget(summary, recipe)
            _write_report(report, result, recipe, summary["over_budget"])
            summary["report"] = str(report)

    run(source, recipe, out=out, runs=runs, fresh=fresh, listener=listener, finish=finish)
    return summary


def _summary(result: CompiledModel | Measured, before: str | None) -> Json:
    """Return what is said of a bundle, and of its figures where it was measured; `before`: see _manifest_sha256."""
    bundle = result.model if isinstance(result, Measured) else result
    weights = bundle.manifest["weights"]
    summary: Json = {
        "bundle": str(bundle.path),
        "bundle_bytes": sum(f.stat().st_size for f in bundle.path.iterdir()),
        "weight_bytes": weights["bytes"],
        "bits_per_weight": weights["bits_per_weight"],
        "task": bundle.manifest["task"],
        "cache_bytes": (bundle.manifest["cache"] or {}).get("bytes"),
        "replaced": before is not None and before != _manifest_sha256(bundle.path),  # another bundle stood there
    }
    if isinstance(result, Measured):
        summary |= {"figures": result.figures} | _headline(result.figures)
    return summary


def _manifest_sha256(bundle: Path) -> str | None:
    """Return the hash of a bundle's manifest, None where there is no bundle."""
    from edgepipe.store import file_sha256

    manifest = bundle / "manifest.json"
    return file_sha256(manifest) if manifest.is_file() else None


def _write_report(path: Path, result: Measured, recipe: Recipe, over: list[str]) -> None:
    """Write the run's page; StageError when the disk doesn't take it: the bundle is there all the same."""
    from edgepipe.report.page import Page, render
    from edgepipe.store import write_text

    page = Page(
        figures=result.figures,
        manifest=result.model.manifest,
        recipe=recipe.to_json(),
        history=result.history,
        over_budget=tuple(over),
    )
    try:
        write_text(path, render(page))
    except OSError as error:
        raise StageError(f"the bundle is at {result.model.path}, but not its report: {error.strerror}") from error


def _headline(figures: Json) -> Json:
    known = ("ttft_ms", "token_ms", "tokens_per_second", "calls", "memory_peak_bytes", "perplexity")
    keys = [key for key in known if key in figures["bundle"]]
    line: Json = {key: figures["bundle"][key] for key in keys}
    line["baseline"] = None if figures["baseline"] is None else {key: figures["baseline"][key] for key in keys}
    return line


def over_budget(summary: Json, recipe: Recipe) -> list[str]:
    """Return one sentence for every budget of the target that the result breaks."""
    figures = summary.get("figures")
    if figures is None:
        return []
    after, before, budgets = figures["bundle"], figures["baseline"], recipe.target.budgets
    checks = [("TTFT in ms", after["ttft_ms"], budgets.ttft_ms)] if "ttft_ms" in after else []
    if before is not None:
        checks.append(("shipped ratio", after["bundle_bytes"] / before["bundle_bytes"], budgets.shipped_ratio))
    if before is not None and "perplexity" in after:
        checks.append(("perplexity ratio", after["perplexity"] / before["perplexity"], budgets.perplexity_ratio))
    return [
        f"over budget: {title} is {value:.3f}, the target {recipe.target.name} allows {allowed:.3f}"
        for title, value, allowed in checks
        if allowed is not None and not value <= allowed  # a perplexity that is no number is over budget too
    ]
