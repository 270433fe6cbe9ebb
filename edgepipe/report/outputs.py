"""Write a report: as a page, as Markdown, as JSON. Each file is whole or not there."""

from __future__ import annotations

from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.report.gather import bundle_in, gather, report_of_run, report_of_unmeasured
from edgepipe.report.markdown import render_markdown
from edgepipe.report.page import render_page
from edgepipe.report.record import Report
from edgepipe.store import write_json, write_text

PAGE, MARKDOWN, DOCUMENT = "report.html", "report.md", "report.json"  # what a run's are called
_KINDS = {".html": render_page, ".md": render_markdown}


def write_run_report(directory: Path, bundle: Path, unmeasured: Json | None = None) -> Path:
    """Write the three reports of a run that has just ended into its directory; return where the page is.

    `unmeasured` is what a run that measured nothing recorded, and why it didn't; else run.json is read.
    """
    if unmeasured is None:
        report = report_of_run(directory, bundle)
    else:
        report = report_of_unmeasured(directory.name, bundle, unmeasured)
    write_text(directory / MARKDOWN, render_markdown(report))
    write_json(directory / DOCUMENT, report.to_json())
    write_text(directory / PAGE, render_page(report))
    return directory / PAGE


def report(paths: list[Path], *, figures: list[Path], out: list[Path]) -> Report:
    """Return the report of bundles, several side by side, and write it to every file of `out`; its ending says how.

    Raises ConfigError for what is no bundle, figures of none of them, or a file that can't be written there.
    """
    for file in out:
        _check_output(file, paths)
    found = gather(paths, figures)
    for file in out:
        try:
            if file.suffix == ".json":
                write_json(file, found.to_json())
            else:
                write_text(file, _KINDS[file.suffix](found))
        except OSError as error:
            raise ConfigError(f"--out {file} can't be written: {error.strerror}; name another place") from error
    return found


def _check_output(file: Path, bundles: list[Path]) -> None:
    """Refuse an output before any work: an unknown kind, a directory, or a place inside a bundle."""
    if file.suffix not in (*_KINDS, ".json"):
        raise ConfigError(f"--out {file}: expected a file that ends in .html, .md or .json, which says what is written")
    if file.is_dir() or not file.parent.is_dir():
        what = "is a directory" if file.is_dir() else f"would lie in {file.parent}, which is no directory"
        raise ConfigError(f"--out {file} {what}: name a file in a directory that is there")
    for bundle in map(bundle_in, bundles):
        if bundle.resolve() in file.resolve().parents:
            raise ConfigError(f"--out {file} would lie in the bundle {bundle}, which may hold no more: name another")
