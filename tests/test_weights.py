"""The lazy store: nothing is read before it is asked for, aliases lead to one weight, and a saved store is the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import QuantizedTensor
from edgepipe.errors import ContractError
from edgepipe.numerics.grids import dequantize
from edgepipe.store import load_weights, save_weights
from edgepipe.weights import Value, Weight, WeightStore
from tests.decoders import CHANGES, gguf_blocks, stored, watched

SHAPE = (6, 40)


def value(storage: str, seed: int = 0) -> Value:
    """Return a matrix stored as one of CHANGES says."""
    return CHANGES[storage](np.random.default_rng(seed).standard_normal(SHAPE, np.float32))


def unread(name: str, **changes: object) -> Weight:
    """Return a weight that fails the test when somebody reads it."""

    def load() -> Value:
        raise AssertionError(f"{name} was read")

    weight = Weight(name=name, shape=SHAPE, dtype="float32", nbytes=960, load=load)
    return dataclasses.replace(weight, **changes)  # type: ignore[arg-type]


def test_a_store_answers_about_weights_without_reading_them() -> None:
    q4 = unread("b", dtype="q4", nbytes=150, grid="rtn")
    store = WeightStore({"a": unread("a"), "b": q4}, {"tied": "a"}, origin="source")
    assert (list(store), len(store)) == (["a", "b"], 2)
    assert "a" in store and "tied" in store and "c" not in store and 7 not in store
    assert store["tied"] is store["a"]
    assert store.parameters == 480  # the tied weight counts once
    assert store.nbytes == 1110
    assert store["b"].bits_per_weight == 5
    assert store["a"].size == 240
    replaced = store.replace({"b": unread("b", nbytes=1)})
    assert (replaced.nbytes, replaced.aliases, list(replaced)) == (961, {"tied": "a"}, ["a", "b"])
    assert store.as_float32().nbytes == 1920
    assert store.nbytes == 1110


def test_replaced_weights_have_no_origin() -> None:
    """What is to be computed can't be read again from where the others came from."""
    store = WeightStore({"a": unread("a")}, origin="source")
    assert store.replace({"a": unread("a")}).origin is None
    assert store.as_float32().origin == "source"


def test_an_unknown_name_is_named() -> None:
    store = WeightStore({"a": unread("a")}, {"lost": "gone"})
    for name in ("c", "lost"):
        with pytest.raises(ContractError, match=f"no tensor named '{name}'"):
            store.load(name)


def test_a_store_keeps_its_own_tables() -> None:
    weights, aliases = {"a": unread("a")}, {"tied": "a"}
    store = WeightStore(weights, aliases)
    weights.clear()
    aliases.clear()
    assert "a" in store and "tied" in store


@pytest.mark.parametrize("storage", CHANGES)
def test_values_are_given_as_stored_and_as_float32(storage: str) -> None:
    held = value(storage)
    store = WeightStore({"w": stored("w", held)}, {"tied": "w"})
    assert store.load("tied") is held
    decoded = store.float32("tied")
    assert (decoded.dtype, decoded.shape) == (np.float32, SHAPE)
    expected = dequantize(held) if isinstance(held, QuantizedTensor) else held.astype(np.float32)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("storage", CHANGES)
def test_the_baseline_is_the_same_values_in_float32(storage: str) -> None:
    store = WeightStore({"w": stored("w", value(storage))}, {"tied": "w"})
    baseline = store.as_float32()
    weight = baseline["tied"]
    assert (weight.dtype, weight.nbytes, weight.grid, weight.bits_per_weight) == ("float32", 960, None, 32)
    found = baseline.load("tied")
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_array_equal(found, store.float32("w"))
    assert baseline.aliases == store.aliases


def test_every_read_computes_anew() -> None:
    """A store holds no values: what nobody keeps is freed."""
    reads = 0

    def load() -> Value:
        nonlocal reads
        reads += 1
        return np.zeros(SHAPE, np.float32)

    store = WeightStore({"w": unread("w", load=load)})
    assert store.load("w") is not store.load("w")
    store.float32("w")
    assert reads == 3


def silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def saved_again(store: WeightStore, directory: Path) -> WeightStore:
    """Write a store and open what was written."""
    directory.mkdir()
    save_weights(store, directory, silent)
    return load_weights(directory)


def test_a_saved_store_is_the_same_store(tmp_path: Path) -> None:
    values: dict[str, Value] = {storage: value(storage, i) for i, storage in enumerate(CHANGES)}
    values["blocks"] = gguf_blocks(np.random.default_rng(0).standard_normal((4, 64), np.float32), "Q5_1")
    values["vector"] = np.arange(5, dtype=np.float32)
    values["scalar row"] = np.ones((1, 1), np.float16)
    store = WeightStore({name: stored(name, held) for name, held in values.items()}, {"tied": "4 bits"})
    again = saved_again(store, tmp_path / "saved")
    assert (list(again), again.aliases) == (list(store), store.aliases)
    assert again.origin == str((tmp_path / "saved").resolve())
    for name, held in values.items():
        one, other = store[name], again[name]
        assert dataclasses.replace(one, load=other.load) == other
        found = again.load(name)
        assert isinstance(found, QuantizedTensor) == isinstance(held, QuantizedTensor)
        np.testing.assert_array_equal(again.float32(name), store.float32(name))
        if isinstance(held, QuantizedTensor) and isinstance(found, QuantizedTensor):
            for part in dataclasses.fields(held):
                np.testing.assert_array_equal(getattr(found, part.name), getattr(held, part.name), err_msg=part.name)
        elif isinstance(found, np.ndarray):
            assert found.dtype == held.dtype  # type: ignore[union-attr]
    twice = saved_again(again, tmp_path / "twice")
    assert (tmp_path / "twice/weights.bin").read_bytes() == (tmp_path / "saved/weights.bin").read_bytes()
    assert twice.nbytes == store.nbytes


def test_saving_reads_one_weight_at_a_time(tmp_path: Path) -> None:
    store, held = watched(WeightStore({str(i): stored(str(i), np.full((8, 8), i, np.float32)) for i in range(5)}))
    save_weights(store, tmp_path, silent)
    assert (held.in_all, held.now) == (5, 0)
    assert held.most == 1


def test_progress_names_the_weight_at_work(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    store = WeightStore({name: stored(name, np.zeros(4, np.float32)) for name in "abc"})
    save_weights(store, tmp_path, lambda what, done, total: said.append((what, done, total)))
    assert said == [("a", 0, 3), ("b", 1, 3), ("c", 2, 3)]
