"""Tuning: every tiling gives the same numbers; the database, resumed, refused, shipped; slow ones search for real."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import Context, Json, OnnxModel
from edgepipe.errors import ConfigError, TargetError
from edgepipe.levels import LEVELS, gpu_named
from edgepipe.numerics.grids import dequantize
from edgepipe.stages.compile import Compile
from edgepipe.store import file_sha256
from edgepipe.target import load_target
from edgepipe.weights import WeightStore
from tests.decoders import TARGET, stored
from tests.engines.tvm_bundles import BOTH, built, decoder

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

from edgepipe.compiling import tuning
from edgepipe.engines import tvm as engine
from edgepipe.engines.native import level_here, runs_here
from edgepipe.engines.tvm import packed, products
from edgepipe.engines.tvm.tiling import Product, Tiling, candidates, default
from tests.engines.test_tvm_kernels import CODES, compiled, random, tensor

FAST = {("4 bits, minima", 1, False), ("8 bits, whole rows", 1, True)}
OUT, IN = 72, 80  # five tiles: the last of two or four at once are not there
FLOATS = [Product(w=packed.floats_of((out, 24), "float32"), rows=1, integers="") for out in (20, 40)]  # two candidates
CASES = [(grid, rows, integers) for grid in CODES for rows in (1, 11) for integers in (False, True)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep databases out of the user's cache."""
    monkeypatch.setenv("EDGEPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("grid", "rows", "integers"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_tiling_of_codes_gives_the_same(grid: str, rows: int, integers: bool) -> None:
    """Integers to the last bit, floats but for the order of sums; and what numpy gives."""
    level = level_here()
    if integers and not level.byte_products:
        pytest.skip("this processor doesn't multiply bytes")
    value = CODES[grid](random(OUT, IN))
    weights, w, known = WeightStore({"w": stored("w", value)}), packed.codes_of(value), 1 if rows == 1 else None
    product = Product(w=w, rows=known, integers=level.byte_products if integers else "")
    tilings = [default(product, level), *candidates(product, level)]
    assert len(tilings) > 5
    prepare = products.rounded if integers else products.group_sums
    kernels = {
        f"tiling_{number}": products.codes_product(w, known, tiling, integers=product.integers)
        for number, tiling in enumerate(tilings)
    }
    library = compiled(prepare=prepare(w.columns, w.group, known), **kernels)
    parts = [tensor(planned.load()) for planned in packed.plan_codes(weights, "w", w)]
    x = np.zeros((rows, w.columns), np.float32)
    x[:, :IN] = random(rows, IN)
    sums = [tensor(np.zeros((rows, w.groups), np.float32)) for _ in range(1 + integers)]
    operands = [tensor(np.zeros(x.shape, np.int8)), *sums] if integers else [tensor(x), *sums]
    library["prepare"](tensor(x), *(operands if integers else sums))
    expected = x[:, :IN] @ dequantize(value).T
    usual = None
    for number, tiling in enumerate(tilings):
        y = tensor(np.full((rows, OUT), np.nan, np.float32))
        library[f"tiling_{number}"](*operands, *parts, y)
        found = y.numpy()
        usual = found if usual is None else usual
        allowed = (2e-2 if integers else 1e-5) * np.abs(expected).max()
        assert np.abs(found - expected).max() < allowed, tiling
        assert np.abs(found - usual).max() <= (0 if integers else 1e-6 * np.abs(expected).max()), tiling


@pytest.mark.parametrize("rows", [1, 13])
def test_every_tiling_of_floats_gives_the_same(rows: int) -> None:
    """Narrow tiles, and columns that no number of them divides."""
    weights = WeightStore({"w": stored("w", random(20, 42))})
    w, known = packed.floats_of((20, 42), "float32"), 1 if rows == 1 else None
    product = Product(w=w, rows=known, integers="")
    tilings = [default(product, level_here()), *candidates(product, level_here())]
    library = compiled(**{f"tiling_{i}": products.float_product(w, known, tiling) for i, tiling in enumerate(tilings)})
    x, weight = random(rows, 42), packed.plan_floats(weights, "w", w).load()
    expected = x @ np.asarray(weights.load("w")).T
    for number, tiling in enumerate(tilings):
        y = tensor(np.full((rows, 20), np.nan, np.float32))
        library[f"tiling_{number}"](tensor(x), tensor(np.ascontiguousarray(weight)), y)
        assert np.abs(y.numpy() - expected).max() < 1e-5 * np.abs(expected).max(), tiling


def search(
    products_of: Counter[Product], *, stop_at: int = -1, minutes: float = 5
) -> tuple[tuning.Database, list[str]]:
    """Search, until a product of a number is to begin; return what was found, and products and notes as they came."""
    heard: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt
        heard.append(f"{done} of {total}: {what}")

    ctx = Context(target=TARGET, work_dir=Path(), progress=progress, note=heard.append)
    return tuning.tune(products_of, level_here(), minutes, ctx), heard


def test_a_search_that_was_stopped_goes_on() -> None:
    """What was finished is in the database and isn't searched again; a third search finds everything there."""
    small, large = FLOATS
    with pytest.raises(KeyboardInterrupt):
        search(Counter(FLOATS), stop_at=1)
    entries = json.loads(tuning.database_path(level_here()).read_text(encoding="utf-8"))["entries"]
    assert list(entries) == [large.key]  # what takes longer comes first
    _, heard = search(Counter(FLOATS))
    assert heard[0] == f"1 of 2: tuning {small.key}" and len(heard) == 2
    assert re.fullmatch(
        r"tuned on .*: another tiling for [012] of 2 products(, .* times as fast as the default on one thread)?",
        heard[1],
    )
    _, heard = search(Counter(FLOATS))
    assert len(heard) == 1


def test_time_is_up() -> None:
    """Products that there was no time for keep their defaults, and the note says how to go on."""
    found, heard = search(Counter(FLOATS), minutes=1e-6)
    assert not found.tilings
    assert heard[-1].endswith("; 2 were not reached in 1e-06 min, and a run with more minutes goes on with them")


def database(path: Path, values: Json) -> Path:
    """Write a database of here and now, but for some values."""
    path.write_text(json.dumps(tuning._head(level_here()) | {"entries": {}} | values), encoding="utf-8")
    return path


WRONG: dict[str, tuple[Json, str]] = {
    "format": ({"format": 0}, "is of format 0, not 1: tune again with --tune MINUTES"),
    "kernels": ({"kernels": "0123"}, "is for kernels 0123, not "),
    "tvm": ({"tvm": "0.26.0"}, "is of apache-tvm 0.26.0, not "),
    "target": ({"target": {"level": "armv8-a"}}, "is for armv8-a, not "),
    "features": ({"target": {"level": level_here().name}}, f"is for another {level_here().name}: tune again"),
    "entries": ({"entries": []}, "is no tuning database: name the tuning.json of a bundle"),
    "size": ({"entries": {"a": {"tiling": {"rows": 1000}}}}, "is no tuning database"),
    "name": ({"entries": {"a": {"tiling": {"rows": 1, "colour": 2}}}}, "is no tuning database"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_database_of_another_version(case: str, tmp_path: Path) -> None:
    """One that is named is refused with a sentence before any work; one in the cache is put aside."""
    values, said = WRONG[case]
    file = database(tmp_path / "tuning.json", values)
    with pytest.raises(ConfigError, match=rf"compile\.tuning: \S*tuning\.json {re.escape(said)}"):
        Compile(engine="tvm", tuning=str(file)).meets(BOTH)
    place = tuning.database_path(level_here())
    place.parent.mkdir(parents=True)
    database(place, values)
    _, heard = search(Counter(), minutes=1)
    assert heard[0].startswith(f"the tuning database {place} was ") and place.with_suffix(".old").exists()
    assert not place.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    """What isn't there and what isn't JSON."""
    with pytest.raises(ConfigError, match=r"compile\.tuning: \S*none can't be read: No such file"):
        Compile(engine="tvm", tuning=str(tmp_path / "none")).reads()
    (tmp_path / "text").write_bytes(b"\xff no JSON")
    with pytest.raises(ConfigError, match="is no tuning database"):
        Compile(engine="tvm", tuning=str(tmp_path / "text")).meets(BOTH)


def test_what_can_t_be_tuned() -> None:
    """Minutes that are none, other engines, machines that this isn't, GPUs."""
    for minutes in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"compile\.tune: expected minutes above 0"):
            Compile(tune=minutes)
    with pytest.raises(ConfigError, match="leave one out"):
        Compile(tune=1, tuning="a.json")
    for options in ({"tune": 1.0}, {"tuning": "a.json"}):
        with pytest.raises(ConfigError, match="are for tvm's kernels, not for onnxruntime's"):
            Compile(**options).meets(load_target("cpu"))  # type: ignore[arg-type]
    other = next(level for level in LEVELS if not runs_here(level))
    with pytest.raises(TargetError, match=rf"compile\.tune: .*{other.name}, so its kernels can't be timed here"):
        tuning.check_tunable(other)
    with pytest.raises(TargetError, match=r"compile\.tune: kernels for .* with nvidia are not tuned"):
        tuning.check_tunable(dataclasses.replace(level_here(), gpu=gpu_named("nvidia")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """Export a decoder on 4 bits."""
    return decoder(tmp_path_factory.mktemp("decoders"), "llama tied", "4 bits")


def test_a_bundle_of_a_named_database(model: OnnxModel, tmp_path: Path) -> None:
    """Its library is another one, and checked; the bundle has the entries that it took."""
    level = level_here()
    asked = engine.lower(model, level, accuracy_level=0).asked
    assert {product.rows for product in asked} == {1, None}
    entries = {product.key: {"tiling": dataclasses.asdict(candidates(product, level)[-1])} for product in asked}
    stray: Json = {"another model's": {"tiling": {"rows": 2}}, "kept": {"tiling": None}}
    file = database(tmp_path / "tuning.json", {"entries": entries | stray, "cpu": "some processor"})
    notes: list[str] = []
    first = built(model, tmp_path / "first", notes, tuning=str(file))
    assert notes[0] == f"tilings of {file}, found on some processor"
    facts = first.manifest["files"]["tuning.json"]
    kept = first.path / "tuning.json"
    assert facts == {"bytes": kept.stat().st_size, "sha256": file_sha256(kept)}
    assert json.loads(kept.read_text(encoding="utf-8"))["entries"] == entries
    plain = built(model, tmp_path / "plain", check_tokens=0)
    assert plain.manifest["files"]["library.so"] != first.manifest["files"]["library.so"]
    assert plain.manifest["files"]["weights.bin"] == first.manifest["files"]["weights.bin"]
    assert "tuning.json" not in plain.manifest["files"]


def test_the_key_knows_the_database(tmp_path: Path) -> None:
    """A stage that named a database is run again when the file is another, one that searched on another processor."""
    file = database(tmp_path / "tuning.json", {})
    stage = Compile(engine="tvm", tuning=str(file))
    before = stage.reads()
    database(file, {"entries": {"a": {"tiling": {"rows": 1}}}})
    assert stage.reads() != before
    assert "tuned_on" in Compile(engine="tvm", tune=1).meets(BOTH)
    assert "tuned_on" not in Compile(engine="tvm").meets(BOTH)


@pytest.mark.slow
def test_a_search_for_a_whole_model(model: OnnxModel, tmp_path: Path) -> None:
    """Every product gets its entry in the cache, the bundle has the faster tilings, and rebuilds from them."""
    notes: list[str] = []
    found = built(model, tmp_path / "a", notes, tune=10)
    entries = json.loads(tuning.database_path(level_here()).read_text(encoding="utf-8"))["entries"]
    assert set(entries) == {product.key for product in engine.lower(model, level_here(), accuracy_level=0).asked}
    faster = {key for key, entry in entries.items() if entry["tiling"] is not None}
    assert all(entries[key]["low"] > 1.02 for key in faster)
    assert f"another tiling for {len(faster)} of {len(entries)} products" in notes[0]
    kept = found.path / "tuning.json"
    assert set(json.loads(kept.read_text(encoding="utf-8"))["entries"]) == faster
    again = built(model, tmp_path / "again", tuning=str(kept))
    assert again.manifest["files"] == found.manifest["files"]


def test_a_tiling_takes_no_instruction_that_isn_t_there() -> None:
    """Where the level has no look-up, the same tiling converts: what is checked here for another machine must run."""
    value = CODES["4 bits"](random(OUT, IN))
    tiling = Tiling(rows=1, table=True)
    key = Product(w=packed.codes_of(value), rows=1, integers="").key
    library = engine.Library(
        weights=WeightStore({}),
        file=engine.WeightsFile(),
        level=dataclasses.replace(level_here(), table=False),
        integers=False,
        has_threads=False,
        multiplied=frozenset(),
        tilings={key: tiling},
    )
    assert library.tiling(packed.codes_of(value), 1, "") == Tiling(rows=1)
