"""Run a bundle with one graph: embed or classify texts, or feed arrays (pixels, features of sound) as they are.

Pooling and normalisation are in the graph, so an embedding is one run. Texts go in batches of similar length, since a
row costs as much as the longest beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.runtime.bundle import Bundle
from edgepipe.runtime.exits import LeavingGraph
from edgepipe.runtime.growing import Graph
from edgepipe.runtime.tokenizer import Tokenizer

Text = str | tuple[str, str]  # two texts for a model that judges pairs

_BATCH = 32  # rows in one run: more gain nothing on a CPU and hold more memory


class Encoder:
    """Embed and classify with one loaded bundle; see `edgepipe.runtime.load`. Safe for concurrent callers."""

    def __init__(self, bundle: Bundle, graph: Graph) -> None:
        """Join a checked bundle and its loaded graph."""
        self._bundle = bundle
        self._graph = graph
        self._model = bundle.manifest["model"]
        self._ends = bundle.manifest["ends"]["model"]
        self._tokenizer = None if bundle.tokenizer is None else Tokenizer(bundle.tokenizer)
        if self._tokenizer is not None and self._model["context"] is not None:
            self._tokenizer.cut_at(self._model["context"])

    @property
    def name(self) -> str:
        """Return the model's name."""
        return str(self._bundle.manifest["name"])

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer; None for a model that reads no text."""
        return self._tokenizer

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return the bundle's manifest."""
        return self._bundle.manifest

    @property
    def context(self) -> int | None:
        """Return the most tokens of a text that are read; None for a model that reads no text."""
        tokens: int | None = self._model["context"]
        return tokens

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the logits; empty for a model without."""
        return tuple(self._model["labels"] or ())

    @property
    def texts_by_depth(self) -> dict[int, int]:
        """Return how many texts left after how many layers since the model was loaded; empty where it has no exits."""
        return self._graph.rows_by_depth if isinstance(self._graph, LeavingGraph) else {}

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Return dtype and shape of what `run` takes, by name; a name in a shape is an axis of any length."""
        return {name: (facts["dtype"], tuple(facts["shape"])) for name, facts in self._ends["inputs"].items()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on arrays and return its outputs by name.

        Raises ConfigError unless the inputs have the names, dtypes and shapes that `inputs` lists.
        """
        expected = self.inputs
        if differing := sorted(set(inputs) ^ set(expected)):
            raise ConfigError(f"{self.name} takes {', '.join(expected)}; {differing[0]} is missing or one too many")
        sizes: dict[str, int] = {}
        for name, (dtype, shape) in expected.items():
            array = inputs[name]
            fits = array.dtype == dtype and array.ndim == len(shape)
            for size, found in zip(shape, array.shape, strict=False):
                fits = fits and found == (sizes.setdefault(size, found) if isinstance(size, str) else size)
            if not fits:
                raise ConfigError(
                    f"{name} should be {dtype} [{', '.join(map(str, shape))}], but is {array.dtype} {list(array.shape)}"
                )
        return self._graph.run({name: np.ascontiguousarray(inputs[name]) for name in expected})

    def embed(self, texts: Text | Sequence[Text], *, batch_size: int = _BATCH) -> np.ndarray:
        """Return the embeddings [n, width] float32 of texts, [width] of a single one.

        A text longer than the context is cut there, as sentence encoders are used. Raises ConfigError when the model
        has no embedding of a text.
        """
        if "embedding" not in self._ends["outputs"]:
            raise ConfigError(f"{self.name} is for {self._bundle.manifest['task']}: it gives no embeddings of texts")
        return self._over_texts(texts, "embedding", batch_size)

    def classify(self, texts: Text | Sequence[Text], *, batch_size: int = _BATCH) -> np.ndarray:
        """Return the logits [n, labels] float32 of texts, [labels] of a single one; `labels` names them.

        Raises ConfigError when the model is no classifier of texts.
        """
        if self._bundle.manifest["task"] != "text-classification":
            raise ConfigError(f"{self.name} is for {self._bundle.manifest['task']}: it classifies no texts")
        return self._over_texts(texts, "logits", batch_size)

    def _over_texts(self, texts: Text | Sequence[Text], output: str, batch_size: int) -> np.ndarray:
        """Run texts in batches of similar length and return one output, in the order of the texts."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, but is {batch_size!r}")
        rows, is_single = _split(texts)
        encoded = self._encoded(rows)
        batch_size = min(batch_size, self._fixed(0) or batch_size)
        order = sorted(range(len(rows)), key=lambda row: len(encoded[row][0]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            outputs = self._graph.run(self._padded([encoded[row] for row in chosen]))[output]
            found |= zip(chosen, outputs, strict=True)
        stacked = np.stack([found[row] for row in range(len(rows))])
        return stacked[0] if is_single else stacked

    def feeds(self, texts: Sequence[Text], tokens: int | None = None) -> dict[str, np.ndarray]:
        """Return what `run` takes for texts that run as one batch, each cut after `tokens` tokens if asked."""
        return self._padded([(ids[:tokens], kinds[:tokens]) for ids, kinds in self._encoded(texts)])

    def _encoded(self, texts: Sequence[Text]) -> list[tuple[list[int], list[int]]]:
        """Return ids and types of every text; ConfigError when the model reads none."""
        if self._tokenizer is None:
            raise ConfigError(f"{self.name} reads no text: give `run` its arrays, {', '.join(self.inputs)}")
        rows = self._tokenizer.encode_rows(texts)
        if empty := [number for number, (ids, _) in enumerate(rows, start=1) if not ids]:
            raise ConfigError(f"text {empty[0]} of {len(rows)} has no tokens: give it some words")
        return rows

    def _fixed(self, axis: int) -> int | None:
        """Return the size that every input of texts must have along an axis: of an NPU's graph; None: any."""
        shapes = [end["shape"] for end in self._ends["inputs"].values()]
        return next((shape[axis] for shape in shapes if len(shape) > axis and isinstance(shape[axis], int)), None)

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
        """Return ids, mask and types of some rows, padded on the right to the longest, or to what the graph is for."""
        shape = (len(rows), self._fixed(1) or max(len(ids) for ids, _ in rows))
        ids = np.full(shape, self._model["pad_token_id"] or 0, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, (row, kinds) in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
            types[number, : len(row)] = kinds
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: given[name] for name in self._ends["inputs"]}


def _split(texts: Any) -> tuple[list[Text], bool]:
    """Return the texts, and whether it was a single one; ConfigError for anything else."""
    if isinstance(texts, str) or (isinstance(texts, tuple) and len(texts) == 2 and _all_texts(texts)):
        return [texts], True
    if not isinstance(texts, Sequence) or len(texts) == 0:
        raise ConfigError(f"expected a text or a list of them, got {type(texts).__name__}: {str(texts)[:40]!r}")
    pairs = all(isinstance(text, tuple) and len(text) == 2 and _all_texts(text) for text in texts)
    if not pairs and not _all_texts(texts):
        raise ConfigError("texts must be a list of texts, or a list of pairs (text, text)")
    return list(texts), False


def _all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
