"""How the lowering names weights: a view of one store entry, or of several joined along their rows."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgepipe.graph.dialect import weight_name

_JOIN = "+"
ROUNDED = "tokens:"  # before the name of a value whose tokens are rounded: the first weight that reads it


def weight_parts(value: ir.Value) -> tuple[str, ...]:
    """Return the store names behind a weight input, in row order; empty when the value isn't a weight."""
    named = weight_name(value.name or "")
    return tuple(named[0].split(_JOIN)) if named else ()


def is_transposed(value: ir.Value | None) -> bool:
    """Say whether a value is the view [in, out] of a weight, or of several that are joined."""
    return value is not None and bool(weight_parts(value)) and (value.name or "").endswith(".T")


def joined_name(views: Sequence[ir.Value]) -> str:
    """Name the join of several views of one kind (all transposed or none)."""
    transposed = (views[0].name or "").endswith(".T")
    parts = _JOIN.join(p for v in views for p in weight_parts(v))
    return f"weight/{parts}{'.T' if transposed else ''}"
