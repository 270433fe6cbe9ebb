"""Reduce the rounds of benchmarks/peers.py to figures, ratios and tables. Pure: everything comes from the result."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from benchmarks.stored import markdown_table
from edgepipe.measuring.intervals import ratio_over_rounds

MOVED = 1.15  # a round in which the machine's speed changed by more is flagged
SPEED_HEADER = (
    *("threads", "engine", "tokens/s", "slowest 5 %, ms", "TTFT p50, ms", "TTFT p95, ms", "perplexity"),
    *("decode: edgepipe ÷ it", "TTFT: edgepipe ÷ it"),
)
PROCESS_HEADER = (
    *("threads", "engine", "executed", "cold start, ms", "load, ms", "memory after load, MB", "peak memory, MB"),
    *("shipped, MB", "perplexity"),
)
Json = dict[str, Any]


def summarise(result: Json) -> Json:
    """Return every row's figures by threads and shape, and the flagged rounds.

    A row that failed anywhere has no figures, only the "error" that its tables show.
    """
    rounds = result["rounds"]
    summary: Json = {
        "flagged_rounds": [number for number, blocks in enumerate(rounds) if moved(blocks)],
        "threads": {},
    }
    for threads in result["workload"]["threads"]:
        figures = {name: _row(result, name, threads) for name in result["builds"]}
        for name, found in figures.items():
            ours = figures.get(result["builds"][name]["row"]["beside"], {"error": "not run"})
            if "error" not in found and "error" not in ours and ours is not found and not name.startswith("edgepipe"):
                _add_ratios(ours, found, result["seed"])
        summary["threads"][str(threads)] = figures
    return summary


def moved(blocks: list[Json]) -> bool:
    """Tell whether the machine's speed changed notably within a round."""
    index = [value for block in blocks for value in block["machine_index_ms"]]
    return max(index) > MOVED * min(index)


def _row(result: Json, name: str, threads: int) -> Json:
    """Return one row's figures at one number of threads."""
    build = result["builds"][name]
    blocks = [b for blocks in result["rounds"] for b in blocks if (b["row"], b["threads"]) == (name, threads)]
    errors = [build.get("error"), *(block.get("error") for block in blocks)]
    if error := next(filter(None, errors), None):
        return {"error": error}
    if not blocks:
        return {"error": "wasn't run"}
    found: Json = {
        key: median(block[key] for block in blocks) for key in ("cold_start_ms", "load_ms", "memory_after_load_bytes")
    }
    found["memory_peak_bytes"] = max(block["memory_peak_bytes"] for block in blocks)
    found["shapes"] = {}
    for number, shape in enumerate(blocks[0]["shapes"]):
        taken = [block["shapes"][number] for block in blocks]
        ttft = [time for one in taken for time in one["ttft_ms"]]
        token = [time for one in taken for times in one["token_ms"] for time in times]
        found["shapes"][f"{shape['prompt_tokens']}x{shape['new_tokens']}"] = {
            "ttft_ms": median(ttft),
            "ttft_p95_ms": float(np.percentile(ttft, 95)),
            "tokens_per_second": 1e3 / median(token),
            "token_p95_ms": float(np.percentile(token, 95)),  # 5 % of tokens were slower
            "ttft_ms_by_round": [median(one["ttft_ms"]) for one in taken],
            "tokens_per_second_by_round": [1e3 / float(np.median(one["token_ms"])) for one in taken],
        }
    return found


def _add_ratios(ours: Json, theirs: Json, seed: int) -> None:
    """Put the ratios of ours to theirs, over the rounds, into theirs."""
    for shape, figures in theirs["shapes"].items():
        mine = ours["shapes"][shape]
        for key, of, bigger in (
            ("decode_ratio", "tokens_per_second_by_round", True),
            ("ttft_ratio", "ttft_ms_by_round", False),
        ):
            ratio = ratio_over_rounds(mine[of], figures[of], seed=seed)
            figures[key] = ratio.to_json(bigger_is_better=bigger)


def speed_rows(result: Json, shape: str) -> list[list[str]]:
    """Return the rows of one shape's table; a row that failed says why and leaves its cells empty."""
    lines = []
    for threads, name, figures in _figures(result):
        if "error" in figures:
            lines.append([threads, name, _reason(figures), *["–"] * (len(SPEED_HEADER) - 3)])
            continue
        one = figures["shapes"][shape]
        lines.append(
            [
                threads,
                name,
                f"{one['tokens_per_second']:.1f}",
                f"{one['token_p95_ms']:.1f}",
                f"{one['ttft_ms']:.0f}",
                f"{one['ttft_p95_ms']:.0f}",
                perplexity(result, name),
                _ratio(one.get("decode_ratio")),
                _ratio(one.get("ttft_ratio")),
            ]
        )
    return lines


def process_rows(result: Json) -> list[list[str]]:
    """Return the rows of the table about whole processes."""
    lines = []
    for threads, name, figures in _figures(result):
        if "error" in figures:
            lines.append([threads, name, _reason(figures), *["–"] * (len(PROCESS_HEADER) - 3)])
            continue
        build = result["builds"][name]
        lines.append(
            [
                threads,
                name,
                build["row"]["precision"],
                f"{figures['cold_start_ms']:.0f}",
                f"{figures['load_ms']:.0f}",
                f"{figures['memory_after_load_bytes'] / 1e6:.0f}",
                f"{figures['memory_peak_bytes'] / 1e6:.0f}",
                f"{build['shipped_bytes'] / 1e6:.1f}",
                perplexity(result, name),
            ]
        )
    return lines


def perplexity(result: Json, name: str) -> str:
    """Return a row's perplexity, or why there is none."""
    quality = result["quality"].get(name, {"error": "not taken"})
    return f"not available: {quality['error']}" if "error" in quality else f"{np.exp(quality['nll']):.2f}"


def tables(result: Json) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Return every table of a run with its title and header."""
    found = [
        (f"{prompt} prompt tokens, {new} new ones", SPEED_HEADER, speed_rows(result, f"{prompt}x{new}"))
        for prompt, new in result["workload"]["shapes"]
    ]
    return [*found, ("A process", PROCESS_HEADER, process_rows(result))]


def page_part(result: Json) -> str:
    """Return a stored run's tables as Markdown, and below them where they come from."""
    parts = []
    for title, header, lines in tables(result):
        parts += [f"**{title}.**", markdown_table(header, lines)]
    return "\n\n".join([*parts, provenance_sentence(result)])


def provenance_sentence(result: Json) -> str:
    """Say in a few lines where a run's figures come from."""
    machine, work = result["machine"], result["workload"]
    flagged = len(result["summary"]["flagged_rounds"])
    versions = sorted({f"{key} {version}" for key, version in result["peer_versions"].items()})
    tokens = next((q["tokens"] for q in result["quality"].values() if "tokens" in q), 0)
    return (
        f"{machine['cpu']}, {machine['cores']} cores seen, {len(result['rounds'])} rounds ({flagged} in which the "
        f"machine's speed moved by more than {MOVED - 1:.0%}), {work['prompts']} prompts of each shape a process. "
        f"Perplexity over {tokens:,} tokens of `{work['text']}`. {', '.join(versions)}, Python {machine['python']}, "
        f"commit `{result['commit'][:12]}`, {result['date']}."
    )


def _figures(result: Json) -> Iterator[tuple[str, str, Json]]:
    for threads, rows in result["summary"]["threads"].items():
        for name, figures in rows.items():
            yield threads, name, figures


def _reason(figures: Json) -> str:
    return f"not available: {figures['error']}".replace("|", "/")


def _ratio(found: Json | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] {found['verdict']}"
