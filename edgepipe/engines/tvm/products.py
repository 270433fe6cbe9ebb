"""Kernels: rows of x times a packed matrix, written by hand in TIR, and gathers from such matrices.

A matrix is packed in tiles of output rows, so that one vector load gives the same columns of 16 rows. Tiles are
shared out among threads; within a tile, blocks of rows of x share every load, and a `Tiling` says how large they are.
16 lanes are one register of AVX-512, two of AVX2 and four of NEON: LLVM splits them.

    float    [tiles, in, width]      width 16 or 32; float32, float16 or bfloat16 (as its bits)
    codes    [tiles, words, 64]      64 bytes = 16 rows of a 32-bit word; byte b, place p hold column p · 4 + b
    scale    [tiles, groups, 16]     zero points (uint8) and minima likewise

With codes of group g:  y = Σ scale · (Σ code · x) + offset · Σ x, where offset is −middle · scale, −zero · scale, or
the minimum. The inner sum is float32, or integers where the processor multiplies bytes (VNNI's vpdpbusd, Arm's sdot,
HVX's vrmpy): x is then rounded to 8 bits by group, as MatMulNBits does at accuracy level 4. sdot takes signed bytes
alone, so codes of 8 bits count from −128 there, and the offset makes up for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgepipe.engines.tvm.functions import ask_for, scratch, typed

if TYPE_CHECKING:
    from edgepipe.engines.tvm.tiling import Tiling

LANES = 16
WORD = 4  # bytes
_OPAQUE = 8  # Relax's kind of kernel that nothing is fused with
ATTRIBUTES = {"tirx.noalias": True, "op_pattern": _OPAQUE}  # of a kernel written by hand
_VNNI, _SDOT = "llvm.x86.avx512.vpdpbusd.512", "llvm.aarch64.neon.sdot.v4i32.v16i8"
_VRMPY = "llvm.hexagon.V6.vrmpybusv.acc.128B"
_TABLE = "llvm.x86.avx512.permvar.sf.512"  # picks of 16 floats by the lowest 4 bits of every lane
_SDOT_LANES = 4  # sums in a register of NEON
_SIGN = 128  # what the codes of 8 bits lose under sdot
_MOST_CODE = 127.0  # of a rounded activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Describe a matrix of packed codes."""

    shape: tuple[int, int]  # (out, in)
    bits: int  # 2, 4 or 8
    group: int  # columns that share a scale
    offset: str  # "middle", "zero_points" or "minima"
    scale_dtype: str
    minima_dtype: str = "float16"
    middle: int = 8

    @property
    def tiles(self) -> int:
        """Return the number of tiles of 16 rows."""
        return -(-self.shape[0] // LANES)

    @property
    def groups(self) -> int:
        """Return the groups of a row."""
        return -(-self.shape[1] // self.group)

    @property
    def per_word(self) -> int:
        """Return the codes in a 32-bit word."""
        return 8 * WORD // self.bits

    @property
    def columns(self) -> int:
        """Return the columns of a row with its padding."""
        return self.groups * self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats:
    """Describe a matrix of packed floats."""

    shape: tuple[int, int]
    width: int  # rows of a tile
    dtype: str  # float32, float16 or bfloat16

    @property
    def tiles(self) -> int:
        """Return the number of tiles."""
        return -(-self.shape[0] // self.width)


def lanes_at(start: Any, lanes: int = LANES) -> Any:
    """Return the index of neighbouring elements."""
    return T.ramp(start, 1, lanes)


def widened(value: Any, dtype: str, lanes: int) -> Any:
    """Return loaded floats as float32; bfloat16 is loaded as its bits."""
    if dtype == "float32":
        return value
    suffix = "" if lanes == 1 else f"x{lanes}"
    if dtype == "bfloat16":
        shift = tirx.const(16, "uint32")
        bits = value.astype(f"uint32{suffix}") << (shift if lanes == 1 else tirx.Broadcast(shift, lanes))
        return tirx.reinterpret(f"float32{suffix}", bits)
    return value.astype(f"float32{suffix}")


def stored_dtype(dtype: str) -> str:
    """Return what a buffer of stored floats is declared as."""
    return "uint16" if dtype == "bfloat16" else dtype


def _splat(value: Any) -> Any:
    return tirx.Broadcast(value, LANES)


def _zeros(places: int, dtype: str) -> Any:
    """Return local vectors of zeros."""
    buffer = scratch(places * LANES, dtype)
    for place in range(places):
        T.buffer_store(buffer, _splat(tirx.const(0, dtype)), [lanes_at(place * LANES)])
    return buffer


def _total(buffers: list[Any], place: int) -> Any:
    """Return the sum of one place of some buffers."""
    at = lanes_at(place * LANES)
    return functools.reduce(lambda total, buffer: total + buffer[at], buffers[1:], buffers[0][at])


def _add(buffer: Any, place: int, value: Any) -> None:
    at = lanes_at(place * LANES)
    T.buffer_store(buffer, buffer[at] + value, [at])


def _rows(rows: int | None) -> Any:
    """Return the number of rows of x as an expression: known, or an argument's size."""
    return tirx.const(rows, "int64") if rows is not None else tirx.Var("m", "int64")


def _store_rows(y: Any, results: list[Any], row: Any, m: Any, column: Any, columns: int) -> None:
    """Store vectors of one row of y, if the row is there, without what pads the last tile."""
    with T.If(row < m), T.Then():
        for j, result in enumerate(results):
            first = column + j * LANES
            if columns % LANES == 0:
                with T.If(first < columns), T.Then():
                    T.buffer_store(y, result, [row, lanes_at(first)])
                continue
            part = scratch(LANES)
            T.buffer_store(part, result, [lanes_at(0)])
            for lane in range(LANES):
                with T.If(first + lane < columns), T.Then():
                    T.buffer_store(y, part[lane], [row, first + lane])


def _header(name: str, handles: int) -> list[Any]:
    T.func_name(name)
    T.func_attr(ATTRIBUTES)
    return [T.arg(f"a{i}", T.handle()) for i in range(handles)]


def float_product(w: Floats, rows: int | None, tiling: Tiling) -> Any:
    """Return the kernel (x [m, in], w) → y [m, out], all float32."""
    n, k = w.shape
    vectors, block = w.width // LANES, tiling.rows
    at_once = math.gcd(k, tiling.words)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            handles = _header("float_product", 3)
            m = _rows(rows)
            x = T.match_buffer(handles[0], [m, k], "float32")
            packed = T.match_buffer(handles[1], [w.tiles, k, w.width], stored_dtype(w.dtype))
            y = T.match_buffer(handles[2], [m, n], "float32")
            with T.parallel(0, w.tiles) as tile, T.serial(0, (m + (block - 1)) // block) as number:
                first = T.Bind(number * block)
                accs = [[_zeros(block, "float32") for _ in range(at_once)] for _ in range(vectors)]
                with T.serial(0, k // at_once) as start:
                    for i in range(at_once):
                        column = start * at_once + i
                        loaded = [
                            T.Bind(widened(packed[tile, column, lanes_at(j * LANES)], w.dtype, LANES))
                            for j in range(vectors)
                        ]
                        for r in range(block):
                            value = T.Bind(_splat(x[tirx.min(first + r, m - 1), column]))
                            for j in range(vectors):
                                _add(accs[j][i], r, value * loaded[j])
                for r in range(block):
                    _store_rows(y, [_total(acc, r) for acc in accs], first + r, m, tile * w.width, n)
    return builder.get()


def _root() -> Any:
    """Return a block around a kernel of one input: Relax looks inside such functions for mere reshapes."""
    return T.sblock("root")


def _lanes(group: int) -> int:
    """Return how many columns of a group are taken at once."""
    return LANES if group % LANES == 0 else 1


def _shared(rows: int | None, m: Any) -> Any:
    """Return the loop over rows: shared out among threads where there may be many."""
    return T.parallel(0, m) if rows is None else T.serial(0, m)


def _at(start: Any, lanes: int) -> Any:
    return start if lanes == 1 else lanes_at(start, lanes)


def _of(buffer: Any, start: Any, lanes: int, row: Any = None) -> Any:
    """Return neighbouring elements of a buffer, or of a row of it."""
    place = _at(start, lanes)
    return buffer[place] if row is None else buffer[row, place]


def _put(buffer: Any, value: Any, lanes: int) -> None:
    T.buffer_store(buffer, value, [_at(0, lanes)])


def _filled(lanes: int, number: float, dtype: str) -> Any:
    """Return a local vector of one value."""
    buffer, value = scratch(lanes, dtype), tirx.const(number, dtype)
    _put(buffer, value if lanes == 1 else tirx.Broadcast(value, lanes), lanes)
    return buffer


def _fold(buffer: Any, lanes: int, join: Callable[[Any, Any], Any]) -> None:
    """Join all lanes of a local vector into its first, halves at a time: a chain would wait for every one of them."""
    while lanes > 1:
        lanes //= 2
        _put(buffer, join(_of(buffer, 0, lanes), _of(buffer, lanes, lanes)), lanes)


def group_sums(columns: int, group: int, rows: int | None) -> Any:
    """Return the kernel x [m, columns] → sums of its groups [m, groups]."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            handles = _header("group_sums", 2)
            m = _rows(rows)
            x = T.match_buffer(handles[0], [m, columns], "float32")
            sums = T.match_buffer(handles[1], [m, columns // group], "float32")
            lanes = _lanes(group)
            with _root():
                with _shared(rows, m) as row, T.serial(0, columns // group) as g:
                    total = _filled(lanes, 0, "float32")
                    with T.serial(0, group // lanes) as i:
                        _put(total, _of(total, 0, lanes) + _of(x, g * group + i * lanes, lanes, row), lanes)
                    _fold(total, lanes, lambda a, b: a + b)
                    T.buffer_store(sums, total[0], [row, g])
    return builder.get()


def rounded(columns: int, group: int, rows: int | None) -> Any:
    """Return the kernel x [m, columns] → 8-bit codes [m, columns], and step and sum of each group [m, groups]."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            handles = _header("rounded", 4)
            m = _rows(rows)
            x = T.match_buffer(handles[0], [m, columns], "float32")
            codes = T.match_buffer(handles[1], [m, columns], "int8")
            steps = T.match_buffer(handles[2], [m, columns // group], "float32")
            sums = T.match_buffer(handles[3], [m, columns // group], "float32")
            lanes = _lanes(group)
            with _root():
                with _shared(rows, m) as row, T.serial(0, columns // group) as g:
                    most = _filled(lanes, 1e-30, "float32")
                    total = _filled(lanes, 0, "int32")
                    with T.serial(0, group // lanes) as i:
                        size = tirx.abs(_of(x, g * group + i * lanes, lanes, row))
                        _put(most, tirx.max(_of(most, 0, lanes), size), lanes)
                    _fold(most, lanes, tirx.max)
                    inverse = T.Bind(tirx.const(_MOST_CODE, "float32") / most[0])
                    factor = inverse if lanes == 1 else tirx.Broadcast(inverse, lanes)
                    with T.serial(0, group // lanes) as i:
                        start = g * group + i * lanes
                        value = tirx.nearbyint(_of(x, start, lanes, row) * factor)
                        code = T.Bind(value.astype(typed("int32", lanes)))
                        T.buffer_store(codes, code.astype(typed("int8", lanes)), [row, _at(start, lanes)])
                        _put(total, _of(total, 0, lanes) + code, lanes)
                    _fold(total, lanes, lambda a, b: a + b)
                    step = T.Bind(most[0] / tirx.const(_MOST_CODE, "float32"))
                    T.buffer_store(steps, step, [row, g])
                    T.buffer_store(sums, step * total[0].astype("float32"), [row, g])
    return builder.get()


def _offset(w: Codes, scale: Any, other: Any, tile: Any, g: Any, less: int) -> Any:
    """Return what a group adds to y for each unit of the sum of x; `less` was taken from every code."""
    if w.offset == "minima":
        minimum = widened(other[tile, g, lanes_at(0)], w.minima_dtype, LANES)
        return minimum + scale * _splat(tirx.const(less, "float32")) if less else minimum
    if w.offset == "zero_points":
        zero = other[tile, g, lanes_at(0)].astype(f"float32x{LANES}")
        return scale * (_splat(tirx.const(less, "float32")) - zero)
    return scale * _splat(tirx.const(less - w.middle, "float32"))


def _match_codes(w: Codes, handles: list[Any]) -> tuple[Any, Any, Any]:
    """Declare the buffers of a matrix: codes, scales, and offsets where there are some."""
    words = w.columns // w.per_word
    codes = T.match_buffer(handles[0], [w.tiles, words, LANES * WORD], "uint8")
    scales = T.match_buffer(handles[1], [w.tiles, w.groups, LANES], stored_dtype(w.scale_dtype))
    if w.offset == "middle":
        return codes, scales, None
    dtype = "uint8" if w.offset == "zero_points" else stored_dtype(w.minima_dtype)
    return codes, scales, T.match_buffer(handles[2], [w.tiles, w.groups, LANES], dtype)


def _parts(w: Codes) -> int:
    return 2 if w.offset == "middle" else 3


def codes_product(w: Codes, rows: int | None, tiling: Tiling, *, integers: str) -> Any:
    """Return the kernel (x, [steps,] sums, codes, scale[, offset]) → y [m, out] float32.

    `integers` is the instruction that multiplies bytes, or empty. x [m, columns] is float32, or with one what `rounded`
    gives; sums [m, groups] are those of x.
    """
    add = {"": _add_floats, "vpdpbusd": _add_vnni, "sdot": _add_sdot, "vrmpy": _add_vrmpy}[integers]
    if tiling.table and not integers and w.bits < 8:
        add = _add_table
    less = _SIGN if integers == "sdot" and w.bits == 8 else 0
    inputs = 3 if integers else 2
    kind = "int32" if integers else "float32"
    words, block, wide = w.group // w.per_word, tiling.rows, min(tiling.tiles, w.tiles)
    at_once = math.gcd(words, tiling.words)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            handles = _header("codes_product", inputs + _parts(w) + 1)
            m = _rows(rows)
            x = T.match_buffer(handles[0], [m, w.columns], "int8" if integers else "float32")
            steps: Any = T.match_buffer(handles[1], [m, w.groups], "float32") if integers else None
            sums = T.match_buffer(handles[inputs - 1], [m, w.groups], "float32")
            codes, scales, other = _match_codes(w, handles[inputs:-1])
            y = T.match_buffer(handles[-1], [m, w.shape[0]], "float32")
            with T.parallel(0, -(-w.tiles // wide)) as task, T.serial(0, (m + (block - 1)) // block) as number:
                first = T.Bind(number * block)
                at = [T.Bind(tirx.min(first + r, m - 1)) for r in range(block)]
                # Where the last ones are missing, one tile is stored twice
                tiles = [T.Bind(tirx.min(task * wide + j, w.tiles - 1)) for j in range(wide)]
                accs = [_zeros(block, "float32") for _ in tiles]
                with T.serial(0, w.groups) as g:
                    parts = [[_zeros(block, kind) for _ in range(at_once)] for _ in tiles]
                    with T.serial(0, words // at_once) as start:
                        for i in range(at_once):
                            word = T.Bind(g * words + start * at_once + i)
                            column = T.Bind(word * w.per_word)
                            for tile, part in zip(tiles, parts, strict=True):
                                if tiling.ahead:
                                    ask_for(codes, tile, word + tiling.ahead, 0)
                                add(w, part[i], (codes, tile, word), x, at, column)
                    for tile, part, acc in zip(tiles, parts, accs, strict=True):
                        scale = T.Bind(widened(scales[tile, g, lanes_at(0)], w.scale_dtype, LANES))
                        offset = T.Bind(_offset(w, scale, other, tile, g, less))
                        for r in range(block):
                            inner = _total(part, r)
                            if integers:
                                inner = inner.astype(f"float32x{LANES}") * _splat(steps[at[r], g])
                            _add(acc, r, scale * inner + offset * _splat(sums[at[r], g]))
                for tile, acc in zip(tiles, accs, strict=True):
                    for r in range(block):
                        _store_rows(y, [acc[lanes_at(r * LANES)]], first + r, m, tile * LANES, w.shape[0])
    return builder.get()


def _words(place: tuple[Any, Any, Any], first: int, lanes: int) -> Any:
    """Load the words of neighbouring rows of a tile, from (codes, tile, number of the word)."""
    codes, tile, number = place
    return T.Bind(tirx.reinterpret(f"uint32x{lanes}", codes[tile, number, lanes_at(first * WORD, lanes * WORD)]))


def _add_floats(w: Codes, part: Any, place_of: Any, x: Any, at: list[Any], column: Any, *, table: Any = None) -> None:
    """Add the products of one word of every row of the tile, decoded to floats: converted, or looked up in a table."""
    mask = _splat(tirx.const((1 << w.bits) - 1, "uint32"))
    word = _words(place_of, 0, LANES)
    for place in range(8 // w.bits):
        for byte in range(WORD):
            shift = _splat(tirx.const(8 * byte + w.bits * place, "uint32"))
            if table is None:
                code = ((word >> shift) & mask).astype(f"int32x{LANES}").astype(f"float32x{LANES}")
            else:
                lowest = tirx.reinterpret(f"int32x{LANES}", word >> shift)
                code = tirx.call_llvm_pure_intrin(f"float32x{LANES}", _TABLE, table, lowest)
            code = T.Bind(code)
            for r, row in enumerate(at):
                _add(part, r, code * _splat(x[row, column + place * WORD + byte]))


def _add_table(w: Codes, part: Any, place_of: Any, x: Any, at: list[Any], column: Any) -> None:
    """Do the same with a table that ignores the bits above a code."""
    values = [tirx.const(i % (1 << w.bits), "float32") for i in range(LANES)]
    table = tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(LANES)])
    _add_floats(w, part, place_of, x, at, column, table=table)


def _four(byte: int) -> int:
    """Return a word of four equal bytes."""
    return int.from_bytes(bytes([byte] * WORD), "little")


def _add_sdot(w: Codes, part: Any, place_of: Any, x: Any, at: list[Any], column: Any) -> None:
    """Add the products of one word of every row of the tile, four rows and four bytes of each at a time."""
    firsts = range(0, LANES, _SDOT_LANES)
    words = [_words(place_of, first, _SDOT_LANES) for first in firsts]

    def wide(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "uint32"), _SDOT_LANES)

    for place in range(8 // w.bits):
        codes = [(word >> wide(w.bits * place)) & wide(_four((1 << w.bits) - 1)) for word in words]
        if w.bits == 8:
            codes = [word ^ wide(_four(_SIGN)) for word in words]
        codes = [T.Bind(tirx.reinterpret("int8x16", code)) for code in codes]
        for r, row in enumerate(at):
            four = tirx.reinterpret("int32", x[row, lanes_at(column + place * WORD, WORD)])
            same = T.Bind(tirx.reinterpret("int8x16", tirx.Broadcast(four, _SDOT_LANES)))
            for first, code in zip(firsts, codes, strict=True):
                sums = lanes_at(r * LANES + first, _SDOT_LANES)
                product = tirx.call_llvm_pure_intrin("int32x4", _SDOT, part[sums], code, same)
                T.buffer_store(part, product, [sums])


def _add_vnni(w: Codes, part: Any, place_of: Any, x: Any, at: list[Any], column: Any) -> None:
    """Add the products of one word of every row of the tile, four bytes at a time."""
    mask = _splat(tirx.const(_four((1 << w.bits) - 1), "uint32"))
    word = _words(place_of, 0, LANES)
    bytes_type = f"int8x{LANES * WORD}"
    for place in range(8 // w.bits):
        shift = _splat(tirx.const(w.bits * place, "uint32"))
        code = T.Bind(tirx.reinterpret(bytes_type, (word >> shift) & mask))
        for r, row in enumerate(at):
            four = tirx.reinterpret("int32", x[row, lanes_at(column + place * WORD, WORD)])
            places = lanes_at(r * LANES)
            product = tirx.call_llvm_pure_intrin(
                f"int32x{LANES}", _VNNI, part[places], code, tirx.reinterpret(bytes_type, _splat(four))
            )
            T.buffer_store(part, product, [places])


def _add_vrmpy(w: Codes, part: Any, place_of: Any, x: Any, at: list[Any], column: Any) -> None:
    """Add the products of one word of every row of the tile, four bytes at a time, two rows of x at once.

    A register of HVX holds two tiles: the same codes stand in both halves, beside a row of x each.
    """
    if len(at) % 2:
        raise ValueError(f"vrmpy takes rows of x in pairs, got {len(at)}")
    mask = _splat(tirx.const(_four((1 << w.bits) - 1), "uint32"))
    word = _words(place_of, 0, LANES)
    for place in range(8 // w.bits):
        shift = _splat(tirx.const(w.bits * place, "uint32"))
        code = T.Bind(_beside(*[tirx.reinterpret(f"int32x{LANES}", (word >> shift) & mask)] * 2))
        for r in range(0, len(at), 2):
            rows = [
                _splat(tirx.reinterpret("int32", x[row, lanes_at(column + place * WORD, WORD)]))
                for row in at[r : r + 2]
            ]
            places = lanes_at(r * LANES, 2 * LANES)
            product = tirx.call_llvm_pure_intrin(f"int32x{2 * LANES}", _VRMPY, part[places], code, _beside(*rows))
            T.buffer_store(part, product, [places])


def _beside(first: Any, second: Any) -> Any:
    """Return two vectors as one of twice the lanes."""
    return tirx.Shuffle([first, second], [tirx.const(i, "int32") for i in range(2 * LANES)])


def gather_codes(w: Codes, count: int | None) -> Any:
    """Return the kernel (ids [n] int64, codes, scale[, offset]) → rows [n, in] float32."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            handles = _header("gather_codes", _parts(w) + 2)
            n = _rows(count)
            ids = T.match_buffer(handles[0], [n], "int64")
            codes, scales, other = _match_codes(w, handles[1:-1])
            y = T.match_buffer(handles[-1], [n, w.shape[1]], "float32")
            with T.serial(0, n) as i, T.serial(0, w.shape[1]) as column:
                counted = T.Bind(tirx.Select(ids[i] < 0, ids[i] + w.shape[0], ids[i]))
                row = T.Bind(tirx.max(tirx.min(counted, w.shape[0] - 1), 0))  # nothing else checks an id
                tile, lane = T.Bind(row // LANES), T.Bind(row % LANES)
                word, inner = column // w.per_word, column % w.per_word
                byte = codes[tile, word, lane * WORD + inner % WORD].astype("uint32")
                shift = (inner // WORD * w.bits).astype("uint32")
                code = ((byte >> shift) & tirx.const((1 << w.bits) - 1, "uint32")).astype("int32").astype("float32")
                g = column // w.group
                scale = widened(scales[tile, g, lane], w.scale_dtype, 1)
                if w.offset == "minima":
                    value = scale * code + widened(other[tile, g, lane], w.minima_dtype, 1)
                elif w.offset == "zero_points":
                    value = scale * (code - other[tile, g, lane].astype("float32"))
                else:
                    value = scale * (code - tirx.const(w.middle, "float32"))
                T.buffer_store(y, value, [i, column])
    return builder.get()
