"""What the two guards found, as the report shows it: how alike two models write, and which products are slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgepipe.artifacts import Json
from edgepipe.report.rows import MISSING, between


def agreement_of(history: Sequence[Json]) -> Json | None:
    """Return what a stage's figures say of token agreement; a manifest's history has none."""
    return next(
        (found["agreement"] for record in history if "agreement" in (found := record.get("figures") or {})), None
    )


def agreement_rows(found: Json) -> Iterator[tuple[str, ...]]:
    """Yield the matrices that were blamed, the worst first: the model with each alone in float, and its fate."""
    raised = {tuple(one["unit"]): one for one in found["raised"]}  # the last grid counts
    for one in found["blamed"]:
        now = raised.get(tuple(one["unit"]))
        spared = list(one["unit"]) in found["unaffordable"]
        fate = f"{now['before']} became {now['after']}" if now else "no bytes left" if spared else "kept"
        yield unit_name(one["unit"]), f"{one['kl']:.2g}", f"{one['share']:.1%}", fate


def agreement_sentences(found: Json) -> Iterator[str]:
    """Say how alike both models write, before and after."""
    before, after = found["before"], found["after"]
    yield f"Greedy answers of the float model, {len(before['parts_at'])} of them: {_alike(before)}."
    if found["raised"]:
        count = len({tuple(one["unit"]) for one in found["raised"]})
        yield f"More bits for {count} of the blamed, the worst first, made it so: {_alike(after)}."
    if after["share"] < found["floor"]:
        yield f"The floor of {found['floor']:.1%} does NOT hold."
    else:
        yield f"The floor of {found['floor']:.1%} holds."
    if found["blamed"]:
        yield "KL and tokens are those of the quantized model with the matrix of that row, alone, put back to float."


def _alike(found: Json) -> str:
    parted = [one for one in found["parts_at"] if one is not None]
    ends = found["kl_by_token"][0], found["kl_by_token"][-1]
    where = f"{len(parted)} of them part, the first after {min(parted)} tokens" if parted else "none parts"
    return (
        f"{found['share']:.1%} of the tokens are the same, {where}, KL {found['kl']:.2g} a token ({ends[0]:.2g} at the "
        f"first, {ends[1]:.2g} at the last)"
    )


def product_rows(products: Sequence[Json]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kind of matrix and number of rows: its time, the float one's, their ratio, what was done."""
    for one in products:
        for number, race in enumerate(one["races"]):
            ratio = race["ratio"]
            out, n_in = one["shape"]
            yield (
                f"{len(one['tensors'])} of {out} × {n_in}" if number == 0 else "",
                f"{one['stored']}, {one['bits_per_weight']:.2f} bits" if number == 0 else "",
                f"{race['rows']}",
                f"{race['ms']:.3f}",
                f"{race['float_ms']:.3f}",
                f"{ratio['value']:.2f} {between(ratio['low'], ratio['high'], 2)}",
                ("undone" if one["undone"] else "kept") if number == 0 else "",
            )


def product_sentences(products: Sequence[Json]) -> Iterator[str]:
    """Say what was undone and why, and how it was taken."""
    undone = [one for one in products if one["undone"]]
    for one in undone:
        out, n_in = one["shape"]
        names = one["tensors"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more} ({out} × {n_in}): {one['why']}."
    if not undone:
        yield "Nothing was undone."
    yield (
        "Products with one matrix, as it ships and in float, in turn, with as many bytes read between two runs as the "
        "rest of the model has; 1 row is a token, 128 a prompt or text."
    )


def unit_name(names: Sequence[str]) -> str:
    """Name matrices that stand together."""
    return MISSING if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
