"""Kernel: LayerNormalization and RMSNormalization of rows, a vector at a time, in float32."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgepipe.engines.tvm.functions import number, scratch
from edgepipe.engines.tvm.products import ATTRIBUTES, LANES, lanes_at


def norm(width: int, epsilon: float, rows: int | None, *, centred: bool, bias: bool) -> Any:
    """Return the kernel (x [m, width], weight[, bias] [width]) → y [m, width]; `centred` subtracts the mean first."""
    lanes = math.gcd(LANES, width)

    def at(place: Any) -> Any:
        return lanes_at(place * lanes, lanes) if lanes > 1 else place

    def wide(value: Any) -> Any:
        return tirx.Broadcast(value, lanes) if lanes > 1 else value

    def added(term: Any) -> Any:
        """Sum a function of the vectors of a row to one number."""
        acc = scratch(lanes)
        T.buffer_store(acc, number(0.0, lanes), [at(0)])
        with T.serial(0, width // lanes) as i:
            T.buffer_store(acc, acc[at(0)] + term(i), [at(0)])
        parts = [acc[lane] for lane in range(lanes)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [parts[i] + parts[i + half] for i in range(half)]
        return T.Bind(parts[0] * number(1.0 / width))

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("layer_norm" if centred else "rms_norm")
            T.func_attr(ATTRIBUTES)
            handles = [T.arg(f"a{i}", T.handle()) for i in range(3 + bias)]
            m = tirx.Var("m", "int64") if rows is None else tirx.const(rows, "int64")
            x, y = (T.match_buffer(handle, [m, width], "float32") for handle in (handles[0], handles[-1]))
            factors = [T.match_buffer(handle, [width], "float32") for handle in handles[1:-1]]
            with T.serial(0, m) as row:
                mean = added(lambda i: x[row, at(i)]) if centred else number(0.0)
                shift = T.Bind(wide(mean))
                square = added(lambda i: (x[row, at(i)] - shift) * (x[row, at(i)] - shift))
                share = T.Bind(wide(number(1.0) / tirx.sqrt(square + number(epsilon))))
                with T.serial(0, width // lanes) as i:
                    value = (x[row, at(i)] - shift) * share * factors[0][at(i)]
                    if bias:
                        value = value + factors[1][at(i)]
                    T.buffer_store(y, value, [row, at(i)])
    return builder.get()
