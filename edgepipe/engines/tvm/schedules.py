"""How functions for a GPU are shared out among blocks and threads: products of one row by a rule of our own
(row_products.py), all else by TVM's default rules (dlight), in their order.

    Matmul                        products of several rows: tiles in shared memory
    GEMV                          other products of one row: a block for a few outputs, threads along the columns
    Reduction, GeneralReduction   softmax, norms
    Fallback                      what is left: a thread for each element

A rule may take a function and leave it in a form that TVM then can't lower, such as scores of one query with grouped
heads. So each is tried, and the next one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm_ffi import structural_map

from edgepipe.engines.tvm.row_products import one_row
from edgepipe.engines.tvm.threads import SCHEDULED
from edgepipe.errors import TargetError

PRODUCT = "product"  # is in the name of every function that multiplies with a weight

_JOINS = 4  # TVM's kOutEWiseFusable
_RULES = (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction, dlight.gpu.Fallback)


def share_out(module: Any, target: Any) -> Any:
    """Return a module with kernels in place of its functions; TargetError where no rule gives one."""
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and SCHEDULED not in function.attrs:
            module[variable] = _kernel(variable.name_hint, _branching(function), target)
    return module


def products_join(module: Any) -> Any:
    """Let products with weights be fused with what follows element by element; TVM takes them for plain reductions."""
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and PRODUCT in variable.name_hint:
            module[variable] = function.with_attr("op_pattern", _JOINS)
    return module


def _branching(function: Any) -> Any:
    """Turn selections into branches: TVM declares a vector of conditions as what is chosen, which nvcc refuses."""

    def branch(node: Any) -> Any:
        return tirx.if_then_else(node.condition, node.true_value, node.false_value)

    return function.with_body(structural_map(function.body, (tirx.Select, branch)))


def _kernel(name: str, function: Any, target: Any) -> Any:
    for rule in (*((one_row,) if PRODUCT in name else ()), *(_applied(rule, target) for rule in _RULES)):
        try:
            found = rule(function)
            if found is None:
                continue
            kernel = found.mod["main"].with_attr(SCHEDULED, True)
            _lower(kernel, target)
        except Exception:  # TVM's checks raise whatever they like
            continue
        return kernel
    raise TargetError(f"the tvm engine can't share out {name} among the threads of a GPU: take a target without one")


def _applied(rule: Any, target: Any) -> Callable[[Any], Any]:
    """Return a rule of dlight's as a function that returns a schedule, or None."""

    def apply(function: Any) -> Any:
        found = rule().apply(function, target, False)
        return found if found is None or isinstance(found, s_tir.Schedule) else found[0]

    return apply


def _lower(kernel: Any, target: Any) -> None:
    """Do with a kernel what TVM does with all of them later."""
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    lower, _, _ = default_s_tir_pipeline()
    lower(tirx.transform.BindTarget(target)(module))
