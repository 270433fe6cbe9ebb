"""Write small ONNX graphs as bytes, without the onnx package, which the base install hasn't got.

A message of protobuf is a row of fields: a key (field number · 8 + kind) and a value, which is a number in groups of
seven bits (kind 0), bytes behind their length (2) or four bytes (5). The numbers below are those of onnx.proto, which
never change. Storing finished graphs instead would hide what is tested; this way a graph stands beside its reference. A
test reads the bytes with onnx and lets its checker judge them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # TensorProto.DataType
_ELEMENTS = {"float32": FLOAT, "uint8": 2, "int32": 6, "int64": 7, "float16": FLOAT16}
_IR_VERSION = 10
_OPSETS = {"": 23, "com.microsoft": 1}  # as in a bundle
_FLOAT_ATTRIBUTE, _INT_ATTRIBUTE = 1, 2  # AttributeProto.AttributeType

Array = np.ndarray | tuple[int, np.ndarray]  # with an element type where numpy has none of that name


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Describe one operator; an empty name stands for an input or output that is left out."""

    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    domain: str = ""
    attributes: Mapping[str, int | float] = field(default_factory=dict)


def graph_bytes(
    nodes: Iterable[Node],
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, Array],
    outputs: Mapping[str, tuple[int, int]],
) -> bytes:
    """Return a model: `inputs` give names, types and shapes, `constants` their values too.

    `outputs` are pairs of element type and number of dimensions, whose sizes are left open.
    """
    graph = b"".join(_message(1, _node(node)) for node in nodes)
    graph += _text(2, "kernel")
    graph += b"".join(_message(5, _tensor(name, array)) for name, array in constants.items())
    for name, array in inputs.items():
        graph += _message(11, _value(name, _ELEMENTS[array.dtype.name], array.shape))
    for name, (element, dimensions) in outputs.items():
        graph += _message(12, _value(name, element, [None] * dimensions))
    opsets = b"".join(_message(8, _text(1, domain) + _number(2, version)) for domain, version in _OPSETS.items())
    return _number(1, _IR_VERSION) + _message(7, graph) + opsets


def _node(node: Node) -> bytes:
    encoded = b"".join(_text(1, name) for name in node.inputs) + b"".join(_text(2, name) for name in node.outputs)
    encoded += _text(4, node.op_type) + _text(7, node.domain)
    for name, value in node.attributes.items():
        if isinstance(value, float):
            attribute = _key(2, 5) + struct.pack("<f", value) + _number(20, _FLOAT_ATTRIBUTE)
        else:
            attribute = _number(3, value) + _number(20, _INT_ATTRIBUTE)
        encoded += _message(5, _text(1, name) + attribute)
    return encoded


def _tensor(name: str, array: Array) -> bytes:
    element, values = array if isinstance(array, tuple) else (_ELEMENTS[array.dtype.name], array)
    dims = b"".join(_number(1, size) for size in values.shape)
    return dims + _number(2, element) + _text(8, name) + _message(9, values.tobytes())


def _value(name: str, element: int, shape: Sequence[int | None]) -> bytes:
    dims = b"".join(_message(1, b"" if size is None else _number(1, size)) for size in shape)
    return _text(1, name) + _message(2, _message(1, _number(1, element) + _message(2, dims)))


def _key(number: int, kind: int) -> bytes:
    return _groups_of_seven(number << 3 | kind)


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _groups_of_seven(value % (1 << 64))  # negative ones as 64-bit two's complement


def _message(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _groups_of_seven(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _groups_of_seven(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
