"""Two measurements: the index cancels a change of the machine's speed, and what is left must fit both intervals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from edgepipe.errors import ConfigError
from edgepipe.measuring.agreement import check_comparable, compare, read_measurement

MACHINE = {"cpu": "A", "cores": 2, "threads": 0, "system": "Linux"}


def measurement(token_ms: float = 20.0, index_ms: float = 2.0, width: float = 0.05) -> dict[str, Any]:
    """Return the part of a measurement that is compared; intervals reach `width` to both sides."""
    per_index = {
        name: {"value": time / index_ms, "low": time / index_ms * (1 - width), "high": time / index_ms * (1 + width)}
        for name, time in (("token_ms", token_ms), ("ttft_ms", 10 * token_ms))
    }
    return {
        "taken_at": "2026-01-02T03:04:05+00:00",
        "machine": dict(MACHINE),
        "method": {"bursts": 8, "counted_tokens": 32, "prompt_tokens": [32, 128]},
        "bundle": {
            "manifest_sha256": "0" * 64,
            "token_ms": token_ms,
            "ttft_ms": 10 * token_ms,
            "per_index": per_index,
        },
    }


def test_a_slower_machine_agrees() -> None:
    """Half the speed an hour later: the index says so, and nothing else changed."""
    found = compare(measurement(40.0, 4.0), measurement(20.0, 2.0))
    token = found["figures"]["token_ms"]
    assert found["agrees"] and found["same_bundle"]
    assert (token["raw_ratio"], token["ratio"]) == pytest.approx((2.0, 1.0))
    assert (token["low"], token["high"]) == pytest.approx((0.95 / 1.05, 1.05 / 0.95))
    assert "20.0 ms then, 40.0 ms now (2.00 times)" in found["sentences"][0]
    assert found["sentences"][0].endswith("they agree")


def test_a_slower_bundle_does_not() -> None:
    """As fast a machine, and 20 % more time than 5 % each can explain."""
    found = compare(measurement(24.0), measurement(20.0))
    assert not found["agrees"]
    assert found["figures"]["token_ms"]["low"] > 1
    assert all(sentence.endswith("they do NOT agree") for sentence in found["sentences"])


def test_they_agree_exactly_when_their_intervals_overlap() -> None:
    for width, agrees in ((0.04, False), (0.06, True)):
        assert compare(measurement(22.1, width=width), measurement(20.0, width=width))["agrees"] is agrees


def test_another_bundle_is_named() -> None:
    earlier = measurement()
    earlier["bundle"]["manifest_sha256"] = "1" * 64
    found = compare(measurement(), earlier)
    assert not found["same_bundle"]
    assert found["sentences"][0].startswith("Another bundle was measured at 2026-01-02")


@pytest.mark.parametrize(("key", "value"), [("cpu", "B"), ("cores", 4), ("threads", 1), ("system", "Darwin")])
def test_another_machine_is_refused(key: str, value: object) -> None:
    check_comparable(measurement(), MACHINE)
    with pytest.raises(ConfigError, match=f"the earlier measurement has {key} "):
        check_comparable(measurement(), MACHINE | {key: value})


def test_other_prompts_are_refused() -> None:
    earlier = measurement()
    earlier["method"]["prompt_tokens"] = [32, 128, 512]
    with pytest.raises(ConfigError, match="measure a bundle for the same task with the same context"):
        compare(measurement(), earlier)


def test_what_was_printed_and_what_a_run_kept_can_both_be_read(tmp_path: Path) -> None:
    printed, kept, noisy = tmp_path / "printed", tmp_path / "run.json", tmp_path / "noisy"
    printed.write_text(json.dumps(measurement()), encoding="utf-8")
    kept.write_text(json.dumps({"recipe": {}, "figures": measurement()}, indent=2), encoding="utf-8")
    noisy.write_text("other output\n" + json.dumps(measurement()) + "\n", encoding="utf-8")
    assert read_measurement(printed) == read_measurement(kept) == read_measurement(noisy) == measurement()


def broken(path: tuple[str, ...], value: object) -> str:
    """Return a measurement as JSON, one of its values another one."""
    whole = copy.deepcopy(measurement())
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[1, 2]",
        "{}",
        '{"figures": null}',
        '{"figures": {"bundle": {"per_index": 3}}}',
        broken(("bundle", "per_index", "token_ms", "low"), 99.0),
        broken(("bundle", "per_index", "token_ms", "value"), None),
        broken(("bundle", "per_index", "ttft_ms"), {}),
        broken(("machine",), {}),
        broken(("method",), {}),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no measurement"):
        read_measurement(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_measurement(tmp_path / "none.json")
