"""The examples a stage trains on, out of the stores of all its sources, by number. Only numbers are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tune.data.mask import Example
from tune.data.store import StoredRows, TokenStore


class Examples(Sequence[Example]):
    """Examples of chosen rows: read from disk each time one is asked for."""

    def __init__(self, rows_of_source: Sequence[StoredRows], chosen: NDArray[np.bool_]) -> None:
        """``chosen`` says for each row, all sources in one line, whether its examples belong here."""
        self._stores = [rows.store for rows in rows_of_source]
        sources, numbers, lengths = [], [], []
        start = 0
        for source, store in enumerate(self._stores):
            per_row = store.examples_per_row()
            picked = np.flatnonzero(np.repeat(chosen[start : start + store.num_rows], per_row))
            start += store.num_rows
            sources.append(np.full(len(picked), source, dtype=np.int16))
            numbers.append(picked)
            lengths.append(store.lengths[picked].astype(np.int32))
        self.sources: NDArray[np.int16] = np.concatenate(sources)
        """For each example the index of its source."""
        self._numbers: NDArray[np.int64] = np.concatenate(numbers)
        self.lengths: NDArray[np.int32] = np.concatenate(lengths)
        """Tokens of each example."""

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def _at(self, index: int) -> Example:
        store: TokenStore = self._stores[self.sources[index]]
        return store.example(int(self._numbers[index]))
