"""The decoder over preallocated caches: chunks, single tokens, batches and rewinds give the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepipe.errors import ContractError, TargetError
from edgepipe.runtime.bundle import read_bundle
from edgepipe.runtime.onnxruntime import Cache, Decoder, open_decoder

TOKENS = 12


@pytest.fixture(scope="module")
def decoder(exact_bundle: Path) -> Decoder:
    """Open a bundle that computes in float32, so that the order of the work decides nothing."""
    bundle = read_bundle(exact_bundle)
    return open_decoder(bundle.path, bundle.manifest, 1)


@pytest.fixture(scope="module")
def ids(decoder: Decoder) -> np.ndarray:
    """Two rows of token ids [2, tokens]."""
    return np.random.default_rng(0).integers(0, decoder.vocab_size, (2, TOKENS), dtype=np.int64)


def run(decoder: Decoder, cache: Cache, ids: np.ndarray, past: int) -> np.ndarray:
    """Append ids [rows, n] after `past` tokens; return the logits of all of them."""
    rows, count = ids.shape
    positions = np.tile(np.arange(count), (rows, 1))
    return decoder.run(cache, ids, np.full(rows, past), np.full(rows, count), positions).copy()


def by_token(decoder: Decoder, cache: Cache, ids: np.ndarray, past: int) -> np.ndarray:
    """Append ids [rows, n] one token at a time."""
    return np.concatenate([run(decoder, cache, ids[:, i : i + 1], past + i) for i in range(ids.shape[1])], axis=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_single_tokens_give_what_the_whole_prompt_gives(decoder: Decoder, ids: np.ndarray, rows: int) -> None:
    whole = run(decoder, decoder.new_cache(rows), ids[:rows], 0)
    steps = by_token(decoder, decoder.new_cache(rows), ids[:rows], 0)
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_chunks_and_single_tokens_mix(decoder: Decoder, ids: np.ndarray) -> None:
    row = ids[:1]
    whole = run(decoder, decoder.new_cache(1), row, 0)
    cache = decoder.new_cache(1)
    parts = [
        run(decoder, cache, row[:, :5], 0),
        by_token(decoder, cache, row[:, 5:7], 5),
        run(decoder, cache, row[:, 7:10], 7),
        by_token(decoder, cache, row[:, 10:], 10),
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_a_smaller_past_rewinds(decoder: Decoder, ids: np.ndarray) -> None:
    row, other = ids[:1], ids[1:]
    expected = run(decoder, decoder.new_cache(1), np.concatenate([row[:, :4], other[:, 4:]], axis=1), 0)[:, 4:]
    cache = decoder.new_cache(1)
    by_token(decoder, cache, row, 0)
    got = by_token(decoder, cache, other[:, 4:], 4)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_rows_of_different_lengths_step_together(decoder: Decoder, ids: np.ndarray) -> None:
    """Row 0 has 3 tokens behind it and row 1 has 6: each gets what it would get alone."""
    cache = decoder.new_cache(2)
    lengths = np.array([3, 6])
    decoder.run(cache, ids[:, :6], np.zeros(2, np.int64), lengths, lengths[:, None] - 1)
    step = decoder.run(cache, ids[:, 6:7], lengths, np.ones(2, np.int64), np.zeros((2, 1), np.int64))
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row : row + 1, :length], ids[row : row + 1, 6:7]], axis=1)
        expected = run(decoder, decoder.new_cache(1), alone, 0)[0, -1]
        np.testing.assert_allclose(step[row, 0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_more_tokens_than_the_context_are_refused(decoder: Decoder) -> None:
    ids = np.zeros((1, 1), np.int64)
    with pytest.raises(ContractError, match="do not fit the context of 128"):
        run(decoder, decoder.new_cache(1), ids, decoder.context)


def test_several_rows_take_several_tokens_only_at_the_beginning(decoder: Decoder, ids: np.ndarray) -> None:
    with pytest.raises(ContractError, match="start at past 0"):
        run(decoder, decoder.new_cache(2), ids[:, :2], 1)


def test_a_graph_onnxruntime_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    manifest = {"graphs": {"decoder": "decoder.onnx"}, "model": {}, "cache": {"dtype": "float32"}}
    with pytest.raises(TargetError, match="onnxruntime could not load the bundle") as caught:
        open_decoder(tmp_path, manifest, None)
    assert "\n" not in str(caught.value)
