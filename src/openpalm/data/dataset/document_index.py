"""Document starts in the tokens of prepared datasets, as segments for the document mask."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from openpalm.data.dataset.manifest import ITEM_BYTES, REMEDY
from openpalm.data.dataset.shards import Dataset
from openpalm.errors import DataError


class _Index(NamedTuple):
    """The index of a shard, memory-mapped; `base`: its dataset's first token among all tokens."""

    starts: np.ndarray
    base: int
    dataset: Dataset


class Documents:
    """The documents of a split of several datasets; their tokens are numbered consecutively."""

    def __init__(self, datasets: Sequence[Dataset], split: str):
        self._indices: list[_Index] = []
        self._ends: list[int] = []  # of the shards, in tokens
        end = 0
        for dataset in datasets:
            base, manifest = end, dataset.manifest
            dataset.check(split)
            files = manifest.splits[split].files
            for tokens, index in zip(files[::2], files[1::2], strict=True):
                path = dataset.path / index.name
                # An empty file cannot be mapped: a document longer than a shard leaves one.
                empty = np.empty(0, dtype="<u8")
                starts = np.memmap(path, dtype="<u8", mode="r") if index.size else empty
                self._indices.append(_Index(np.asarray(starts), base, dataset))
                end += tokens.size // ITEM_BYTES[manifest.dtype]
                self._ends.append(end)

    def segments(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: for each token, the documents that started after token `start`.

        Raises DataError where the index is torn in that range.
        """
        begins = np.zeros(stop - start, dtype=np.int64)
        here, shard = start, bisect_right(self._ends, start)
        while here < stop:
            end = min(stop, self._ends[shard])
            begins[self._starts(self._indices[shard], here, end) - start] = 1
            here, shard = end, shard + 1
        return begins.cumsum()

    def _starts(self, index: _Index, start: int, stop: int) -> np.ndarray:
        # Numbers of the index's own dtype: for any other, NumPy would convert the whole index.
        wanted = np.array([start - index.base, stop - index.base], dtype=index.starts.dtype)
        low, high = np.searchsorted(index.starts, wanted)
        found = index.starts[low:high].astype(np.int64) + index.base
        if (np.diff(found) < 0).any() or (found < start).any() or (found >= stop).any():
            raise DataError(f"{index.dataset.path}: its index is torn; {REMEDY}")
        return found
