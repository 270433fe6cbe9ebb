"""`edgepipe report`: bundles and runs, one or several, with the figures that belong to them and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgepipe.cli import main
from edgepipe.measure import measure
from edgepipe.report.gather import bundle_in
from edgepipe.stages.measure import Measure
from tests.listener import Silent
from tests.report.conftest import as_older, measured_run

QUICK = Measure(tokens=64, blocks=1, turns=2)


def cli(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def document(result: Result) -> dict[str, Any]:
    """Return the last line of stdout of a command that went well."""
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def refused(result: Result) -> str:
    """Return the sentence of a request that was wrong."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture(scope="session")
def printed(tiny_bundle: Path, float_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure a bundle against another, and keep what is printed."""
    file = tmp_path_factory.mktemp("printed") / "figures.json"
    figures = measure(tiny_bundle, QUICK, listener=Silent(), against=float_bundle)
    file.write_text(f"[1/1] a log line\n{json.dumps(figures)}\n", encoding="utf-8")
    return file


def test_one_run_as_page_markdown_and_json(run: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"all.{ending}" for ending in ("html", "md", "json")]
    result = cli(run, *(word for file in files for word in ("--out", file)))
    found = document(result)
    assert found["comparison"] is None
    assert files[0].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert files[1].read_text(encoding="utf-8").strip() == result.stderr.strip()
    assert json.loads(files[2].read_text(encoding="utf-8")) == found


def test_a_run_and_its_bundle_are_the_same(run: Path) -> None:
    by_run, by_bundle = (document(cli(path))["bundles"][0] for path in (run, run / "bundle"))
    assert by_run | {"path": ""} == by_bundle | {"path": ""}
    assert by_run["measured"] is not None


def test_a_run_whose_bundle_went_elsewhere(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kept"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("bundle", "baseline"))
    shutil.copytree(run / "bundle", copy / "03-compile" / "bundle", dirs_exist_ok=True)
    assert document(cli(copy))["bundles"][0]["measured"] is not None


def test_a_run_of_two_engines_whose_bundle_went_elsewhere(run: Path, tmp_path: Path) -> None:
    """Of what both left in the run's directory, the one that was measured is meant."""
    copy = tmp_path / "kept"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("bundle", "baseline", "03-compile"))
    shutil.copytree(run / "baseline" / "02-compile" / "bundle", copy / "03-compile-onnxruntime" / "bundle")
    shutil.copytree(run / "bundle", copy / "03-compile-tvm" / "bundle")
    assert bundle_in(copy) == copy / "03-compile-tvm" / "bundle"


def test_a_run_s_baseline_has_its_figures(run: Path) -> None:
    """Measured in turn with the bundle, so the pair is judged."""
    baseline = run / "baseline" / "02-compile" / "bundle"
    found = document(cli(run, baseline))
    figures = json.loads((run / "run.json").read_text(encoding="utf-8"))["figures"]
    assert found["comparison"]["labels"] == [run.name, f"{run.name} baseline"]
    rows = {row["key"]: row["values"] for row in found["comparison"]["rows"]}
    for key in ("token_ms", "ttft_ms", "bundle_bytes", "perplexity"):
        assert rows[key] == [figures["bundle"][key], figures["baseline"][key]]
    said = found["comparison"]["verdict"]
    assert len(said) == 2
    for sentence, key in zip(said, ("token_ms", "ttft_ms"), strict=True):
        ratio = figures["ratios"][key]
        assert f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" in sentence
        assert sentence.endswith({"tie": "a tie."}.get(ratio["verdict"], f"{ratio['verdict']}."))


def test_bundles_of_different_runs_are_compared_per_index(
    run: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    """No ratio across measurements; both are shown in units of the index, with their intervals."""
    other = measured_run(tiny_model_dir, tmp_path / "runs", ("export", "context", 128), ("quantize", "bits", 8))
    found = document(cli(run, other))["comparison"]
    (sentence,) = found["verdict"]
    assert sentence.startswith("Bundles that weren't measured in turn: compare their times ÷ index")
    rows = {row["key"]: row for row in found["rows"]}
    for key in ("token_ms", "ttft_ms"):
        row = rows[f"{key}_per_index"]
        for place, one in enumerate((run, other)):
            stored = json.loads((one / "run.json").read_text(encoding="utf-8"))["figures"]["bundle"]["per_index"][key]
            assert (row["values"][place], row["lows"][place], row["highs"][place]) == (
                stored["value"],
                stored["low"],
                stored["high"],
            )


def other_machine(record: dict[str, Any]) -> None:
    """Let a run have been measured elsewhere, as another bundle."""
    record["figures"]["machine"]["cpu"] = "Another CPU"


@pytest.mark.parametrize(
    ("edit", "words"), [(other_machine, "on different machines"), (as_older, "by an older version, without the speed")]
)
def test_times_that_can_t_be_compared(
    run: Path,
    change_run: Callable[..., Path],
    edit: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    (sentence,) = document(cli(run, change_run(edit)))["comparison"]["verdict"]
    assert words in sentence


def test_a_bundle_without_figures_says_how_to_measure(tiny_bundle: Path) -> None:
    one = document(cli(tiny_bundle))["bundles"][0]
    assert one["measured"] is None
    assert {row["key"] for row in one["rows"]} == {"bundle_bytes", "bits_per_weight", "cache_bytes"}
    assert one["remarks"] == [
        f"Not measured yet: keep what `edgepipe measure {tiny_bundle}` prints in a file, and give that with --figures."
    ]


def test_printed_figures_find_their_bundles(tiny_bundle: Path, float_bundle: Path, printed: Path) -> None:
    """As the bundle and as the one beside it: the pair is judged."""
    found = document(cli(tiny_bundle, float_bundle, "--figures", printed))
    assert all(one["measured"] is not None for one in found["bundles"])
    assert [one["baseline"] for one in found["bundles"]] == ["the other bundle", None]
    assert len(found["comparison"]["verdict"]) == 2
    assert all(", measured in turn: " in sentence for sentence in found["comparison"]["verdict"])


def test_figures_of_another_build_are_not_shown(change_run: Callable[..., Path]) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["figures"]["bundle"]["manifest_sha256"] = "0" * 64

    changed = change_run(edit)
    one = document(cli(changed))["bundles"][0]
    assert one["measured"] is None
    assert one["remarks"][0] == f"The figures in {changed / 'run.json'} are of another build of it."


def test_bad_requests(
    run: Path,
    tiny_bundle: Path,
    printed: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text("{}", encoding="utf-8")
    for words, sentence in (
        ((tmp_path / "empty",), "has no manifest.json"),
        ((tmp_path / "missing",), "does not exist"),
        ((run, run / "bundle"), "is the bundle that"),
        ((tiny_bundle, tiny_bundle), "name each one once"),
        ((run, "--figures", printed), "has figures of another bundle than"),
        ((run, "--figures", tmp_path / "no.json"), "holds no figures of a bundle"),
        ((run, "--figures", tmp_path / "missing.json"), "can't be read"),
        ((run, "--out", tmp_path / "page.pdf"), "ends in .html, .md or .json"),
        ((run, "--out", tmp_path / "nowhere" / "page.md"), "is no directory"),
        ((tiny_bundle, "--out", tiny_bundle / "page.md"), "would lie in the bundle"),
        ((run, "--out", run / "bundle" / "page.md"), "would lie in the bundle"),
    ):
        assert sentence in refused(cli(*words))
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "no.json"}


@pytest.mark.parametrize("spoil", ["machine", "bundle"])
def test_a_damaged_record_is_one_sentence(change_run: Callable[..., Path], spoil: str) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["figures"][spoil] = {"manifest_sha256": record["figures"]["bundle"]["manifest_sha256"]}

    assert "lack what a report needs" in refused(cli(change_run(edit)))


def test_a_record_that_is_no_json(change_run: Callable[..., Path]) -> None:
    changed = change_run(lambda _record: None)
    (changed / "run.json").write_text("{", encoding="utf-8")
    assert "holds no figures of a bundle" in refused(cli(changed))
