"""The lazy weight store: names → weights that are read, or computed, only when somebody asks.

A store never holds values. It holds one `Weight` per name: shape, storage, bytes, and a function that produces the
value. A stage that changes weights returns a store with other functions in it; `store.save_weights` runs them one
at a time and gives back a store over the memory-mapped file. So no step holds two copies of a model, and no step
holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.errors import ContractError
from edgepipe.numerics.grids import dequantize

Value = np.ndarray | QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Describe one stored weight without holding it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy / ml_dtypes name of a float weight, or "q2" / "q4" / "q8" for a QuantizedTensor
    nbytes: int  # bytes as stored
    load: Callable[[], Value]
    grid: str | None = None  # "Q4_1", "rtn" … when the value is a QuantizedTensor

    @property
    def size(self) -> int:
        """Return the number of parameters."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        """Return stored bits per parameter, scales and offsets included."""
        return 8 * self.nbytes / max(1, self.size)


def held_weight(name: str, value: np.ndarray) -> Weight:
    """Describe a float32 weight that is in memory, as training leaves it."""
    return Weight(name=name, shape=value.shape, dtype="float32", nbytes=value.nbytes, load=lambda: value)


class WeightStore(Mapping[str, Weight]):
    """Map parameter names to lazy weights. Tied weights are one entry with one name per use in `aliases`.

    `origin` says where the values can be read again: a directory written by `store.save_weights`, "source" for the
    model as it was opened, or None when they are still to be computed.
    """

    def __init__(
        self, weights: Mapping[str, Weight], aliases: Mapping[str, str] | None = None, *, origin: str | None = None
    ) -> None:
        self._weights = dict(weights)
        self.aliases = dict(aliases or {})
        self.origin = origin

    def __getitem__(self, name: str) -> Weight:
        """Return the record of `name`, following an alias."""
        try:
            return self._weights[self.aliases.get(name, name)]
        except KeyError:
            raise ContractError(f"the weight store has no tensor named {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._weights or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def load(self, name: str) -> Value:
        """Read one weight as it is stored."""
        return self[name].load()

    def float32(self, name: str) -> np.ndarray:
        """Read one weight as float32, decoded when it lies on a grid. Shape: the weight's own."""
        value = self.load(name)
        if isinstance(value, QuantizedTensor):
            return dequantize(value)
        return np.asarray(value, dtype=np.float32)

    def replace(self, changed: Mapping[str, Weight]) -> WeightStore:
        """Return a store in which the named weights are others."""
        return WeightStore({**self._weights, **changed}, self.aliases)

    def only(self, names: Iterable[str]) -> WeightStore:
        """Return the store of the named weights alone, with the aliases that lead to one of them."""
        kept = {self[name].name for name in names}
        aliases = {alias: name for alias, name in self.aliases.items() if name in kept}
        return WeightStore({n: w for n, w in self._weights.items() if n in kept}, aliases, origin=self.origin)

    def as_float32(self) -> WeightStore:
        """Return the store with every weight decoded to float32: the uncompressed baseline."""
        decoded = {
            w.name: replace(w, dtype="float32", nbytes=4 * w.size, grid=None, load=partial(self.float32, w.name))
            for w in self._weights.values()
        }
        return WeightStore(decoded, self.aliases, origin=self.origin)

    @property
    def parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return sum(w.size for w in self._weights.values())

    @property
    def nbytes(self) -> int:
        """Return the stored bytes of all weights."""
        return sum(w.nbytes for w in self._weights.values())
