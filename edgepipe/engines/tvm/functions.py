"""Functions of one float as arithmetic that vectorises: LLVM turns calls of libm into one call a lane.

exp: Cephes' expf (S. Moshier), relative error 2e-7. erf: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LEAST, _EXP_MOST = -87.3, 88.3  # beyond: no normal float32
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_STEP = 0.3275911
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23


def number(value: float, lanes: int = 1) -> Any:
    """Return a float32 constant, in every lane."""
    constant = tirx.const(value, "float32")
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)


def typed(dtype: str, lanes: int) -> str:
    """Return the name of a scalar or vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def scratch(size: int, dtype: str = "float32") -> Any:
    """Return a buffer for one iteration of a loop, below 1 KiB, which LLVM keeps in registers.

    In TVM's scope "local" it would come from the heap, call by call, and LLVM would write every sum back.
    """
    return T.alloc_buffer([size], dtype, scope="global")


def ask_for(buffer: Any, *place: Any) -> None:
    """Ask memory for what lies at a place of a buffer; beyond its end nothing comes, and no harm is done."""
    hints = [tirx.const(value, "int32") for value in (0, 3, 1)]  # to read; into every cache; data
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", tirx.address_of(buffer[place]), *hints))


def exp(x: Any, lanes: int = 1) -> Any:
    """Return e^x; x below −87.3 counts as −87.3."""

    def c(value: float) -> Any:
        return number(value, lanes)

    x = tirx.max(tirx.min(x, c(_EXP_MOST)), c(_EXP_LEAST))
    n = tirx.floor(x * c(_LOG2E) + c(0.5))
    f = x - n * c(_LN2_HIGH) - n * c(_LN2_LOW)
    y = c(_EXP[0])
    for factor in _EXP[1:]:
        y = y * f + c(factor)
    y = y * f * f + f + c(1.0)
    integers = typed("int32", lanes)
    bias, bits = (tirx.const(v, "int32") for v in (_EXPONENT_BIAS, _MANTISSA_BITS))
    if lanes > 1:
        bias, bits = tirx.Broadcast(bias, lanes), tirx.Broadcast(bits, lanes)
    power = tirx.reinterpret(typed("float32", lanes), (n.astype(integers) + bias) << bits)
    return y * power


def erf(x: Any) -> Any:
    """Return the error function of a scalar."""
    size = tirx.abs(x)
    t = number(1.0) / (number(1.0) + number(_ERF_STEP) * size)
    y = number(_ERF[0])
    for factor in _ERF[1:]:
        y = y * t + number(factor)
    y = number(1.0) - y * t * exp(number(0.0) - size * size)
    return tirx.Select(x < number(0.0), number(0.0) - y, y)


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of a scalar."""
    e = exp(number(-2.0) * tirx.abs(x))
    y = (number(1.0) - e) / (number(1.0) + e)
    return tirx.Select(x < number(0.0), number(0.0) - y, y)


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e^−x)."""
    return number(1.0) / (number(1.0) + exp(number(0.0) - x))


def gelu(x: Any) -> Any:
    """Return x · Φ(x), exactly."""
    return number(0.5) * x * (number(1.0) + erf(x * number(0.7071067811865476)))


def gelu_tanh(x: Any) -> Any:
    """Return x · Φ(x) by its approximation with tanh."""
    inner = number(0.7978845608028654) * (x + number(0.044715) * x * x * x)
    return number(0.5) * x * (number(1.0) + tanh(inner))
