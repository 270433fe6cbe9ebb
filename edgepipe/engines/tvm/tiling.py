"""Which tiling a product takes: what ships for a level, and what a search tries in its place (docs/tvm.md).

A product is known by its matrix (grid, shape), by how many rows of x it takes (one token, or any number of them) and by
its arithmetic. How the tiles are shared out among threads is the same for all tilings, so that a thread's work decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.engines.tvm.products import Codes, Floats
from edgepipe.levels import Level

_MOST_AT_ONCE = 32
_MEASURED = ("x86-64-v4-vnni", "x86-64-v4")  # levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Say how a product goes through its matrix; every tiling gives the same numbers, but for the order of sums."""

    rows: int  # of x that share a load of the matrix
    tiles: int = 1  # of codes that share a load of x
    words: int = 1  # of codes, or columns of floats, with sums of their own: fewer additions wait for each other
    table: bool = False  # codes of 2 and 4 bits become floats by a look-up, where Level.table says that there is one

    def __post_init__(self) -> None:
        """Refuse what would fill a library with one kernel."""
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
    if rows == 1:
        looked_up = codes is not None and codes.bits < 8
        return Tiling(rows=1) if product.integers else Tiling(rows=1, words=4, table=looked_up)
    # Codes that are taken apart for products of bytes leave no room for tiles beside each other. Four tiles and four
    # rows are as fast, but leave threads less to share.
    beside = codes is not None and (codes.bits == 8 or not product.integers)
    return Tiling(rows=min(rows, level.rows), tiles=2 if beside else 1)


def candidates(product: Product, level: Level) -> list[Tiling]:
    """Return what a search tries beside the default: as many sums as the level's registers hold, more or less."""
    most, half = level.rows, level.rows // 2
    codes = product.w if isinstance(product.w, Codes) else None
    if product.rows == 1:
        sizes = [(1, tiles, words) for words in (1, 2, 4) for tiles in ((1, 2) if codes else (1,))]
    elif codes:
        sizes = [(most, 1, 1), (half, 2, 1), (half, 4, 1), (half, 2, 2), (most, 2, 1), (most, 1, 2), (most - 2, 2, 1)]
    else:
        sizes = [(rows, 1, 1) for rows in (half, most - 2, most, most + half)]
    # With many rows decoding hardly counts
    looks_up = level.table and codes and codes.bits < 8 and product.rows == 1 and not product.integers
    found = [
        Tiling(rows=min(product.rows or rows, rows), tiles=tiles, words=words, table=table)
        for rows, tiles, words in sizes
        for table in ((False, True) if looks_up else (False,))
    ]
    return [tiling for tiling in dict.fromkeys(found) if tiling != default(product, level)]
