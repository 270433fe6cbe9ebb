"""What a compiled bundle is compared with, whatever its engine: the portable graphs, on seeded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepipe.artifacts import Json, OnnxModel
from edgepipe.errors import ContractError
from edgepipe.runtime.exits import GATE

if TYPE_CHECKING:
    from edgepipe.runtime.text_generation import Decoder

TINY = 1e-30  # an output of zeros has no size to compare with
EXACT = 0  # MatMulNBits accuracy level: float32 arithmetic


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold the seeded ids of a check: an answer, and what an encoder and a scorer are asked where there are such."""

    ids: np.ndarray  # [1, n] int64
    sources: dict[str, np.ndarray]  # input_ids, attention_mask [rows, n] int64, the first row whole
    tokens: np.ndarray  # [5] int64

    @classmethod
    def seeded(cls, spec: Json, count: int, seed: int) -> Asked:
        """Make `count` seeded tokens of an answer, and two sources of as many."""
        from edgepipe.graph.parts import padding

        rng, shape = np.random.default_rng(seed), (2, count)
        ids = rng.integers(0, spec["vocab_size"], (1, count), dtype=np.int64)
        sources = {"input_ids": rng.integers(0, spec["vocab_size"], shape), "attention_mask": padding([*shape])}
        return cls(ids, sources, rng.integers(0, spec["vocab_size"], 5))

    @property
    def source(self) -> dict[str, np.ndarray]:
        """Return the one source that is answered."""
        return {name: value[:1] for name, value in self.sources.items()}


def portable(model: OnnxModel, asked: Asked) -> list[np.ndarray]:
    """Return the portable logits [1, n, vocab], and behind an encoder those of the scorer and the encoder's outputs."""
    from edgepipe.graph.evaluate import evaluate, logits_in_pieces, prompt_logits

    if "encoder" not in model.graphs:
        return [prompt_logits(model, asked.ids)]
    logits = logits_in_pieces(model, asked.ids, [asked.ids.shape[1]], asked.source)
    crossed = evaluate(model.graphs["encoder"], model.weights, asked.sources)
    return [logits, logits[0, 0, asked.tokens], *crossed.values()]


def within(kind: str, error: float, allowed: float) -> str:
    """Return an error as a note says it; ContractError when it is larger than allowed."""
    if not error <= allowed:
        raise ContractError(
            f"the lowered graph ({kind}) differs from the portable one by {error:.1e} of the logits; "
            f"allowed {allowed:.0e}"
        )
    return f"{error:.0e} {kind}"


def rms(values: np.ndarray) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def worst_error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest error of any output, in that output's largest value; NaN stays NaN."""
    return float(np.max([np.abs(g - e).max() / max(np.abs(e).max(), TINY) for g, e in zip(got, expected, strict=True)]))


def worst_loss(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest RMS difference of any output, in that output's RMS; NaN stays NaN."""
    return float(np.max([rms(g - e) / max(rms(e), TINY) for g, e in zip(got, expected, strict=True)]))


def beside_one(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return outputs as they are compared: log odds of a gate, which may all be near 0, are numbers beside 1.

    How far rounding as it ships moves them isn't compared: that shows in what texts lose by leaving.
    """
    return {
        name: np.append(value, np.ones(1, value.dtype)) if name == GATE else value for name, value in outputs.items()
    }


def in_steps(
    decoder: Decoder, encoder: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None, asked: Asked
) -> list[np.ndarray]:
    """Do the same with an opened decoder, and what runs the encoder where there is one."""
    cache = decoder.new_cache(1)
    found: list[np.ndarray] = []
    if encoder is not None:
        decoder.read_source(cache, 0, asked.source["input_ids"])
        found.append(decoder.score(asked.source["input_ids"], asked.ids[:, :1], asked.tokens))
        found += encoder(asked.sources).values()
    count = asked.ids.shape[1]
    prompt = count - count // 4
    pieces = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, count))]:
        positions = np.arange(end - start, dtype=np.int64)[None]
        logits = decoder.run(cache, asked.ids[:, start:end], np.array([start]), np.array([end - start]), positions)
        pieces.append(logits.copy())
    return [np.concatenate(pieces, axis=1), *found]


def one_by_one(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """Return the logits [n, vocab] of an opened decoder for ids [1, n], run token by token from the first on."""
    cache = decoder.new_cache(1)
    one, first = np.array([1]), np.array([[0]])
    steps = (decoder.run(cache, ids[:, [i]], np.array([i]), one, first)[0, 0].copy() for i in range(ids.shape[1]))
    return np.stack(list(steps))
