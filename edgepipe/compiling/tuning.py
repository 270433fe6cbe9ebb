"""Tune: search the tilings of a model's products by the clock, and keep them in a database (docs/tvm.md).

A database is JSON: what it was made with, and an entry for each product that was searched. The user's cache has one for
every level and processor, written again after each product, so that a search that was stopped goes on. A bundle has
what its library was built with. Only `compile.tune` reads the one in the cache, and only `compile.tuning` one of a
bundle: without either a recipe gives the library that it always gave.

A search times each candidate some turns beside the default, and the best of them again: an entry is the candidate whose
gain the second time is beyond doubt, or none.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgepipe.artifacts import Context, Json
from edgepipe.errors import ConfigError, TargetError
from edgepipe.levels import Level
from edgepipe.lock import alone
from edgepipe.machine.facts import cpu_name
from edgepipe.measuring.intervals import ratio_over_rounds
from edgepipe.sources.packaged import cache_directory
from edgepipe.store import read_json, versions, write_json

if TYPE_CHECKING:
    from edgepipe.engines.tvm.tiling import Product, Tiling

_FORMAT = 1
_KERNELS = ("functions.py", "products.py", "tiling.py")  # of the engine: what entries are about
_GAIN = 1.02  # least ratio of times, at the low end of its interval, for which a default is left
_SCREEN, _TURNS = 5, 31
_FINALISTS = 2
_STEPS = 80  # tokens that follow a prompt: what decides which product is searched first
_HEAD = {"format": "of format", "kernels": "for kernels", "tvm": "of apache-tvm", "target": "for"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """Hold tilings by the products they are for, and what they were found with."""

    head: Json
    tilings: Mapping[str, Tiling]  # by Product.key; a product that keeps its default is left out

    def only(self, keys: Collection[str]) -> Database:
        """Return it without other products."""
        return Database(head=self.head, tilings={key: one for key, one in self.tilings.items() if key in keys})

    def to_json(self) -> Json:
        """Return what a bundle keeps: no times, which differ from run to run."""
        return {**self.head, "entries": {key: {"tiling": asdict(one)} for key, one in self.tilings.items()}}


def check_tunable(level: Level) -> str:
    """Return the name of the processor that kernels of a level are timed on; TargetError where they can't be, here."""
    from edgepipe.engines.native import lacking

    if level.gpu is not None:
        raise TargetError(f"compile.tune: kernels for {level.title} are not tuned, only a processor's: leave it out")
    if missing := lacking(level):
        raise TargetError(
            f"compile.tune: {missing}, so its kernels can't be timed here: tune on such a machine, and name the "
            "tuning.json of that bundle in compile.tuning"
        )
    return cpu_name()


def read_database(path: Path, level: Level) -> Database:
    """Read a database that a user names; ConfigError where it is none, or for another version or target."""
    try:
        found = read_json(path)
        head = {key: found[key] for key in (*_HEAD, "cpu")}
        stale = _differs(head, level)
        tilings = {} if stale else _tilings(found["entries"])
    except OSError as error:
        raise ConfigError(f"compile.tuning: {path} can't be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"compile.tuning: {path} is no tuning database: name the tuning.json of a bundle") from error
    if stale:
        raise ConfigError(f"compile.tuning: {path} is {stale}: tune again with --tune MINUTES")
    return Database(head=head, tilings=tilings)


def tune(products: Counter[Product], level: Level, minutes: float, ctx: Context) -> Database:
    """Search for the tilings of products, those that take longest first, until the minutes are over.

    What the user's cache has of them already isn't searched again.
    """
    from edgepipe.engines.tvm.timing import matrix_bytes

    until = time.monotonic() + 60 * minutes
    read = sum(matrix_bytes(one) * products[one] for one in products if one.rows == 1)  # for every token
    order = sorted(products, key=lambda product: _work(product) * products[product], reverse=True)
    path = database_path(level)
    with alone(path.with_suffix(".lock"), f"the tuning database {path}"):
        entries = _kept(path, level, ctx)
        for done, product in enumerate(order):
            if product.key in entries:
                continue
            ctx.progress(f"tuning {product.key}", done, len(order))
            entry = _searched(product, read, level, until)
            if entry is None:
                break
            entries[product.key] = entry
            write_json(path, {**_head(level), "entries": entries})
    own = {product.key: entries[product.key] for product in order if product.key in entries}
    ctx.note(_said(own, len(order), minutes))
    ctx.figures({"tuning": own})
    return Database(head=_head(level), tilings=_tilings(own))


def database_path(level: Level) -> Path:
    """Return where the user's cache keeps what was found for a level on this processor."""
    processor = hashlib.sha256(cpu_name().encode()).hexdigest()[:8]
    return cache_directory("tuning") / f"{level.name}-{processor}.json"


def _head(level: Level) -> Json:
    """Return what a database was made with."""
    kernels = hashlib.sha256()
    for name in _KERNELS:
        kernels.update((Path(__file__).parents[1] / "engines" / "tvm" / name).read_bytes())
    target = {"level": level.name, **level.target()}
    versioned = {"format": _FORMAT, "kernels": kernels.hexdigest()[:12], "tvm": versions()["apache-tvm"]}
    return {**versioned, "target": target, "cpu": cpu_name()}


def _differs(head: Json, level: Level) -> str:
    """Say in what a database differs from what is here; empty where it doesn't. Another processor's is as good."""
    here = _head(level)
    for key, words in _HEAD.items():
        if head[key] != here[key]:
            theirs, ours = ((one[key]["level"] if key == "target" else one[key]) for one in (head, here))
            return f"{words} {theirs}, not {ours}" if theirs != ours else f"{words} another {ours}"
    return ""


def _kept(path: Path, level: Level, ctx: Context) -> dict[str, Json]:
    """Return the entries of the user's cache; a file for other versions is put aside."""
    if not path.exists():
        return {}
    try:
        stale = _differs(found := read_json(path), level)
        if not stale:
            _tilings(found["entries"])
            return dict(found["entries"])
    except (ValueError, LookupError, TypeError, AttributeError):
        stale = "damaged"
    aside = path.with_suffix(".old")
    path.replace(aside)
    ctx.note(f"the tuning database {path} was {stale}: it is {aside.name} now, and a new one begun")
    return {}


def _tilings(entries: Mapping[str, Json]) -> dict[str, Tiling]:
    from edgepipe.engines.tvm.tiling import Tiling

    return {key: Tiling(**entry["tiling"]) for key, entry in entries.items() if entry["tiling"] is not None}


def _work(product: Product) -> int:
    """Return multiply-adds of a prompt, or of the tokens after it."""
    from edgepipe.engines.tvm.timing import ROWS

    out, columns = product.w.shape
    return out * columns * (_STEPS if product.rows == 1 else product.rows or ROWS)


def _searched(product: Product, model_bytes: int, level: Level, until: float) -> Json | None:
    """Return the entry of a product: the tiling that is faster than the default, if any. None: time was over."""
    from edgepipe.engines.tvm.tiling import candidates, default
    from edgepipe.engines.tvm.timing import Operands, compiled, shortened

    product = shortened(product)
    operands = Operands(product, model_bytes)
    tilings = candidates(product, level)
    turns = []
    for tiling in (default(product, level), *tilings):
        turns.append(operands.turn(compiled(product, tiling, level)))
        if time.monotonic() > until:
            return None
    usual, *others = turns
    screened: list[list[float]] = [[] for _ in others]
    for _ in range(_SCREEN):
        beside = usual()
        for ratios, turn in zip(screened, others, strict=True):
            ratios.append(beside / turn())
    gains = [median(ratios) for ratios in screened]
    best: Json = {"tiling": None}
    for number in sorted(range(len(tilings)), key=lambda i: -gains[i])[:_FINALISTS]:
        ratio = _beside(usual, others[number])
        if time.monotonic() > until:
            return None
        if ratio["low"] > max(_GAIN, best.get("low", 0.0)):
            best = {"tiling": asdict(tilings[number]), **ratio}
    return best


def _beside(usual: Any, other: Any) -> Json:
    """Return the ratio of two kernels' times with its interval, from turns of both; each is first as often."""
    turns: tuple[tuple[Any, list[float]], ...] = ((usual, []), (other, []))
    for number in range(_TURNS):
        for take, seconds in turns if number % 2 else reversed(turns):
            seconds.append(take())
    ratio = ratio_over_rounds(turns[0][1], turns[1][1], seed=0)
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "turns": _TURNS}


def _said(own: Mapping[str, Json], count: int, minutes: float) -> str:
    """Sum a search up in a sentence."""
    gains = sorted(entry["ratio"] for entry in own.values() if entry["tiling"] is not None)
    between = " to ".join(dict.fromkeys(f"{gain:.2f}" for gain in gains[:1] + gains[-1:]))
    faster = f", {between} times as fast as the default on one thread" if gains else ""
    said = f"tuned on {cpu_name()}: another tiling for {len(gains)} of {count} products{faster}"
    missed = count - len(own)
    more = f"; {missed} were not reached in {minutes:g} min, and a run with more minutes goes on with them"
    return said + (more if missed else "")
