import json
from pathlib import Path

import pytest

from benchmarks.genai import NAME, PAGE, page_section, slug, summarise
from benchmarks.genai_models import our_names
from benchmarks.stored import RESULTS, section


def _stored() -> list[Path]:
    return sorted(RESULTS.glob(f"{NAME}-*.json"))


def test_the_page_shows_the_stored_runs() -> None:
    """No figure in benchmarks/README.md is typed by hand."""
    assert _stored()
    assert section(PAGE, NAME) == page_section(_stored()).strip()


@pytest.mark.parametrize("file", _stored(), ids=lambda file: file.stem)
def test_ratios_follow_from_the_raw_samples(file: Path) -> None:
    """What a result says in summary comes out again from its samples and seed."""
    result = json.loads(file.read_text(encoding="utf-8"))
    again = summarise(result["rounds"], list(result["builds"]), result["seed"])
    for threads, engines in result["summary"]["threads"].items():
        for engine, figures in engines.items():
            for key, value in figures.items():
                assert again["threads"][threads][engine][key] == pytest.approx(value), (threads, engine, key)


@pytest.mark.parametrize("file", _stored(), ids=lambda file: file.stem)
def test_both_engines_had_the_same_weights(file: Path) -> None:
    """A stored run counts only if genai's builder found every one of our codes."""
    result = json.loads(file.read_text(encoding="utf-8"))
    counts = [build["codes"] for build in result["builds"].values() if "codes" in build]
    assert counts
    assert all(c["codes"] > 0 and c["codes_that_differ"] == c["values_that_differ"] == 0 for c in counts)


def test_joined_rows_are_named_in_their_order() -> None:
    """A joined matrix of genai's stands for several of ours, head to tail."""
    assert our_names("model.layers.12.attn.qkv_proj.MatMul.weight_Q4") == (
        "model.layers.12.self_attn.q_proj.weight",
        "model.layers.12.self_attn.k_proj.weight",
        "model.layers.12.self_attn.v_proj.weight",
    )
    assert our_names("lm_head.MatMul.weight_Q4") == ("lm_head.weight",)


def test_a_processor_names_a_file() -> None:
    """Marks and spaces of a processor's name don't reach the file system."""
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"
