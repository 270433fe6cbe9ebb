"""How functions for a GPU are shared out among blocks and threads: by TVM's default rules (dlight), in their order.

Matmul            products of several rows: tiles in shared memory
GEMV              products of one row: a block for a few outputs, threads along the columns
Reduction, GeneralReduction   softmax, norms
Fallback          what is left: a thread for each element
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx
from tvm.s_tir import dlight
from tvm.tirx.transform import prim_func_pass
from tvm_ffi import structural_map


def passes(functions: Sequence[str]) -> list[Any]:
    """Return the passes that make kernels of a module's functions; those of `functions` are called from outside."""
    rules = (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction, dlight.gpu.Fallback)
    # Reshapes that became views are functions still
    unused = relax.transform.DeadCodeElimination(list(functions))
    branching = prim_func_pass(_branching, opt_level=0, name="Branching")
    return [unused, branching, dlight.ApplyDefaultSchedule(*(rule() for rule in rules))]


def _branching(function: Any, _module: Any, _context: Any) -> Any:
    """Turn selections into branches: TVM declares a vector of conditions as what is chosen, which nvcc refuses."""

    def branch(node: Any) -> Any:
        return tirx.if_then_else(node.condition, node.true_value, node.false_value)

    return function.with_body(structural_map(function.body, (tirx.Select, branch)))
