"""Compile the graphs into a library of TVM's, check it through the runtime that ships, and write the bundle.

A library for a machine that this one isn't can't run here. Its functions in exact arithmetic are compiled once more
then, for this machine, and those are checked.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import Context, Json, OnnxModel
from edgepipe.bundle import TUNING, write_bundle
from edgepipe.compiling.checks import EXACT, Asked, beside_one, in_steps, portable, within, worst_error, worst_loss
from edgepipe.errors import TargetError
from edgepipe.levels import Level
from edgepipe.runtime.exits import GATE
from edgepipe.store import file_sha256, write_json
from edgepipe.target import Target

_EXACT_LIBRARY = "exact.so"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Say what a library must be like."""

    level: Level
    accuracy_level: int  # of products of codes, as MatMulNBits has it
    cache_dtype: str
    check_tokens: int  # 0 leaves the check out
    exact_tolerance: float  # largest error of exact arithmetic, in largest outputs
    shipped_tolerance: float  # RMS difference as shipped, in RMS
    tune: float = 0.0  # minutes of a search for tilings; 0: none
    tuning: str = ""  # a database that has them


def check_tvm(cache_dtype: str, target: Target, *, checked: bool) -> Level:
    """Refuse what the engine can't do, or can't do here, before any work; return the level of a target's library.

    `checked` says that the library's functions are run here.
    """
    if any(importlib.util.find_spec(name) is None for name in ("tvm", "tvm_ffi")):
        raise TargetError("the tvm engine needs packages that aren't here: pip install 'edgepipe[tvm]'")
    if cache_dtype == "int8":
        raise TargetError("the tvm engine keeps caches of float16 or float32: take one of these, or onnxruntime")
    from edgepipe.engines.linking import check_linker
    from edgepipe.engines.native import level_here, runs_here

    level = target.tvm.named or target.tvm.on(level_here())
    check_linker(level)
    if level.gpu is not None:
        from edgepipe.engines.nvcc import check_nvcc

        check_nvcc()
    if checked and not runs_here(level):
        check_linker(level_here())
    return level


def build_library(model: OnnxModel, wanted: Wanted, path: Path, ctx: Context) -> Json:
    """Compile a library and write it beside its weights in `path`; return the bundle's manifest."""
    from edgepipe.engines import tvm as engine
    from edgepipe.engines.native import level_here, runs_here

    level, cache_dtype = wanted.level, wanted.cache_dtype
    native = runs_here(level)
    lower = partial(engine.lower, model, cache_dtype=cache_dtype)
    tilings = _tilings(partial(lower, level, accuracy_level=wanted.accuracy_level), wanted, path, ctx)
    common = level if native else replace(level, table=False)  # no instruction that this machine may lack
    exact = lower(common, accuracy_level=EXACT, exact=True, tilings=tilings)
    library = lower(level, accuracy_level=wanted.accuracy_level, file=exact.file, tilings=tilings)
    engine.write(library, path, lambda done, total: ctx.progress("writing weights", done, total))
    start = time.perf_counter()
    ctx.progress("compiling the library", 0, 1)
    engine.build(library, path / engine.LIBRARY_NAME)
    seconds = time.perf_counter() - start
    facts = engine.describe(library)
    if wanted.check_tokens:
        checked = {"exact": facts}
        if library.integers or not native:  # its structure is checked in exact arithmetic, as onnxruntime's is
            on = level if native else level_here()
            engine.build(exact, path / _EXACT_LIBRARY, on)
            checked = {"exact": engine.describe(exact, on) | {"file": _EXACT_LIBRARY}}
            checked |= {"as shipped": facts} if native else {}
        _check(model, wanted, checked, path, ctx)
        if not native:
            said = f"a library for {level.title} can't run here"
            ctx.note(f"those are its functions as compiled for this machine: {said}")
        (path / _EXACT_LIBRARY).unlink(missing_ok=True)
    code, weights = (path / engine.LIBRARY_NAME).stat().st_size, library.file.nbytes
    ctx.note(f"a library of {code / 1024:,.0f} KiB for {level.title}, and {weights / 1024:,.0f} KiB of weights")
    ctx.figures({"compile_s": seconds, "code_bytes": code, "weight_bytes": weights})
    return write_bundle(model, path, library.file, ctx.recipe, cache_dtype, library=facts)


def _tilings(lower: Callable[..., Any], wanted: Wanted, path: Path, ctx: Context) -> Mapping[str, Any]:
    """Return what takes the place of the default tilings, and leave it in `path`; nothing where nobody asks for it."""
    from edgepipe.compiling.tuning import read_database, tune

    if not wanted.tune and not wanted.tuning:
        return {}
    products = lower().asked
    if wanted.tune:
        found = tune(products, wanted.level, wanted.tune, ctx)
    else:
        found = read_database(Path(wanted.tuning), wanted.level)
        ctx.note(f"tilings of {wanted.tuning}, found on {found.head['cpu']}")
    write_json(path / TUNING, found.only({product.key for product in products}).to_json())
    return found.tilings


def _check(model: OnnxModel, wanted: Wanted, checked: Mapping[str, Json], path: Path, ctx: Context) -> None:
    """Compare the functions of libraries with the portable graphs."""
    ctx.progress("the portable graphs' outputs", 0, 2)
    expected, runs = (_whole if "ends" in model.spec else _stepwise)(model, wanted, ctx.seed + 1)
    said = []
    for kind, facts in checked.items():
        ctx.progress(f"the library's outputs, {kind}", 1, 2)
        got = runs(path, facts)
        if kind == "exact":
            error = worst_error([got[name] for name in expected], list(expected.values()))
            said.append(within(kind, error, wanted.exact_tolerance))
        else:
            names = [name for name in expected if not name.endswith(GATE)]
            loss = worst_loss([got[name] for name in names], [expected[name] for name in names])
            said.append(within(kind, loss, wanted.shipped_tolerance))
    ctx.note(f"agrees with the portable graphs: {', '.join(said)}")


_Outputs = dict[str, np.ndarray]
_Expected = tuple[_Outputs, Callable[[Path, Json], _Outputs]]


def _stepwise(model: OnnxModel, wanted: Wanted, seed: int) -> _Expected:
    """Return what a decoder's portable graphs give for seeded ids, and what runs a library on the same in steps."""
    from edgepipe.runtime.tvm import Decoder

    asked = Asked.seeded(model.spec, min(wanted.check_tokens, model.spec["context"]), seed)

    def numbered(values: list[np.ndarray]) -> _Outputs:
        return {str(number): value for number, value in enumerate(values)}

    def run(path: Path, facts: Json) -> _Outputs:
        library, manifest = _opened(model, path, facts, wanted.cache_dtype)
        encoder = library.function("encoder").run if "encoder" in model.graphs else None
        return numbered(in_steps(Decoder(library, manifest), encoder, asked))

    return numbered(portable(model, asked)), run


def _whole(model: OnnxModel, wanted: Wanted, seed: int) -> _Expected:
    """Return what graphs without a preallocated cache give for seeded inputs, and what runs a library on the same."""
    from edgepipe.graph.evaluate import evaluate
    from edgepipe.graph.parts import seeded_feeds

    ends, vocab = model.spec["ends"], model.spec["vocab_size"]
    feeds = {name: seeded_feeds(ends[name]["inputs"], vocab, seed) for name in model.graphs}

    def named(graph: str, outputs: Mapping[str, np.ndarray]) -> _Outputs:
        return {f"{graph}.{name}": value for name, value in beside_one(outputs).items()}

    def run(path: Path, facts: Json) -> _Outputs:
        library, _ = _opened(model, path, facts, wanted.cache_dtype)
        found: _Outputs = {}
        for name in model.graphs:
            found |= named(name, library.function(name).run(feeds[name]))
        return found

    expected: _Outputs = {}
    for name, graph in model.graphs.items():
        expected |= named(name, evaluate(graph, model.weights, feeds[name]))
    return expected, run


def _opened(model: OnnxModel, path: Path, facts: Json, cache_dtype: str) -> tuple[Any, Json]:
    """Load a library as the runtime does, before there is a manifest; return it and what the manifest will say."""
    from edgepipe.runtime.tvm import open_library

    files: Json = {name: {"bytes": (path / name).stat().st_size} for name in (facts["file"], "weights.bin")}
    files[facts["file"]]["sha256"] = file_sha256(path / facts["file"])
    spec = {**model.spec, "context": None} if "model" in model.graphs else model.spec  # a check may be longer than it
    manifest = {
        "files": files,
        "weights": {"file": "weights.bin"},
        "library": facts,
        "model": spec,
        "cache": {"dtype": cache_dtype},
        "graphs": dict.fromkeys(model.graphs, facts["file"]),
    }
    return open_library(path, manifest, None), manifest
