"""Which tiling a product takes: what ships for a level, and what a search tries in its place (docs/tvm.md).

A product is known by its matrix (grid, shape), by how many rows of x it takes (one token, or any number of them) and by
its arithmetic. How the tiles are shared out among threads is the same for all tilings, so that a thread's work decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.engines.tvm.products import Codes, Floats
from edgepipe.levels import Level

_MOST_AT_ONCE, _MOST_AHEAD = 32, 1024
_MEASURED = ("x86-64-v4-vnni", "x86-64-v4")  # levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Say how a product goes through its matrix; every tiling gives the same numbers, but for the order of sums."""

    rows: int  # of x that share a load of the matrix
    tiles: int = 1  # of codes that share a load of x
    words: int = 1  # of codes, or columns of floats, with sums of their own: fewer additions wait for each other
    ahead: int = 0  # words of codes that memory is asked for before they are read; 0: the processor guesses
    table: bool = False  # codes of 2 and 4 bits become floats by a look-up, where Level.table says that there is one

    def __post_init__(self) -> None:
        """Refuse what would fill a library with one kernel, and what memory can't be asked for."""
        if type(self.ahead) is not int or not 0 <= self.ahead <= _MOST_AHEAD:
            raise ValueError(f"expected 0 to {_MOST_AHEAD}, got {self.ahead!r}")
        for size in (self.rows, self.tiles, self.words):
            if type(size) is not int or not 1 <= size <= _MOST_AT_ONCE:
                raise ValueError(f"expected 1 to {_MOST_AT_ONCE}, got {size!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Describe one product with a packed matrix."""

    w: Codes | Floats
    rows: int | None  # of x; None: any number
    integers: str  # the instruction that multiplies bytes; empty: float32

    @property
    def key(self) -> str:
        """Return its name in a database: all that its kernel depends on."""
        w, rows = self.w, "1 row" if self.rows == 1 else f"{self.rows or 'any'} rows"
        if isinstance(w, Floats):
            grid = f"{w.dtype} by {w.width}"
        else:
            minima = f" {w.minima_dtype}" if w.offset == "minima" else ""
            grid = f"{w.bits} bits, groups of {w.group}, {w.scale_dtype}, {w.offset}{minima}"
        return f"{w.shape[0]}x{w.shape[1]}, {grid}; {rows}, {self.integers or 'float32'}"


def default(product: Product, level: Level) -> Tiling:
    """Return the tiling that ships: on AVX-512 what was fastest on a Zen 5, elsewhere nothing was measured."""
    rows = product.rows or level.rows
    codes = product.w if isinstance(product.w, Codes) else None
    if level.name not in _MEASURED:
        return Tiling(rows=min(rows, level.rows))
    if rows == 1 and codes is not None:
        words, looked_up = (1, False) if product.integers else (4, codes.bits < 8)
        return Tiling(rows=1, words=words, ahead=128, table=looked_up)
    if rows == 1:
        return Tiling(rows=1, words=4)
    # Codes that are taken apart for products of bytes leave no room for tiles beside each other. Four tiles and four
    # rows are as fast, but leave threads less to share.
    beside = codes is not None and (codes.bits == 8 or not product.integers)
    return Tiling(rows=min(rows, level.rows), tiles=2 if beside else 1)


def candidates(product: Product, level: Level) -> list[Tiling]:
    """Return what a search tries beside the default: as many sums as the level's registers hold, more or less."""
    most, half = level.rows, level.rows // 2
    codes = product.w if isinstance(product.w, Codes) else None
    if product.rows == 1 and codes:
        table = level.table and codes.bits < 8 and not product.integers
        found = [
            Tiling(rows=1, words=words, ahead=ahead, table=table) for words in (1, 2, 4) for ahead in (0, 64, 128, 256)
        ]
        found += [Tiling(rows=1, tiles=2, words=2, table=table)]
        found += [Tiling(rows=1, words=4, ahead=ahead) for ahead in (0, 128)]
    elif product.rows == 1:
        found = [Tiling(rows=1, words=words) for words in (1, 2, 4)]
    elif codes:
        sizes = [(most, 1, 1), (half, 2, 1), (half, 4, 1), (half, 2, 2), (most, 2, 1), (most, 1, 2), (most - 2, 2, 1)]
        found = [Tiling(rows=min(product.rows or rows, rows), tiles=tiles, words=words) for rows, tiles, words in sizes]
    else:
        found = [Tiling(rows=min(product.rows or rows, rows)) for rows in (half, most - 2, most, most + half)]
    return [tiling for tiling in dict.fromkeys(found) if tiling != default(product, level)]
