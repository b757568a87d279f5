"""Document starts in the tokens of prepared datasets, as segments for the document mask."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from openpalm.data.dataset.blocks import BlockArray, BlocksManifest
from openpalm.data.dataset.manifest import ITEM_BYTES, REMEDY
from openpalm.data.dataset.shards import Dataset
from openpalm.errors import DataError

COUNTED_TOKENS = 1 << 22
"""read at once where documents are counted"""


class _Index(NamedTuple):
    """The index of a shard; `base`: its dataset's first token among all tokens.

    starts: the starts in a range of the dataset's tokens.
    """

    starts: Callable[[int, int], np.ndarray]
    base: int
    dataset: Dataset


class Documents:
    """The documents of a split of several datasets; their tokens are numbered consecutively."""

    def __init__(self, datasets: Sequence[Dataset], split: str):
        self._indices: list[_Index] = []
        self._ends: list[int] = []  # of the shards, in tokens
        for dataset in datasets:
            dataset.check(split)
            add = self._add_blocks if isinstance(dataset.manifest, BlocksManifest) else self._add
            add(dataset, split, self._ends[-1] if self._ends else 0)

    def _add(self, dataset: Dataset, split: str, base: int) -> None:
        end, files = base, dataset.manifest.splits[split].files
        for tokens, index in zip(files[::2], files[1::2], strict=True):
            # An empty file cannot be mapped: a document longer than a shard leaves one.
            empty = np.empty(0, dtype="<u8")
            path = dataset.path / index.name
            starts = np.memmap(path, dtype="<u8", mode="r") if index.size else empty
            found = partial(_between, np.asarray(starts))
            self._indices.append(_Index(found, base, dataset))
            end += tokens.size // ITEM_BYTES[dataset.manifest.dtype]
            self._ends.append(end)

    def _add_blocks(self, dataset: Dataset, split: str, base: int) -> None:
        """Blocks have no index: their documents start behind end-of-text tokens."""
        assert isinstance(dataset.manifest, BlocksManifest)
        tokens = BlockArray(dataset.path, dataset.manifest, split)
        marker = dataset.tokenizer().end_of_text
        found = partial(tokens.document_starts, end_of_text=marker)
        self._indices.append(_Index(found, base, dataset))
        self._ends.append(base + len(tokens))

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

    def count(self, stop: int) -> int:
        """The number of documents that start before token `stop`."""
        found, here = 0, 0
        while here < stop:
            shard = bisect_right(self._ends, here)
            end = min(stop, self._ends[shard], here + COUNTED_TOKENS)
            found += len(self._starts(self._indices[shard], here, end))
            here = end
        return found

    def _starts(self, index: _Index, start: int, stop: int) -> np.ndarray:
        found = index.starts(start - index.base, stop - index.base) + index.base
        if (np.diff(found) < 0).any() or (found < start).any() or (found >= stop).any():
            raise DataError(f"{index.dataset.path}: its index is torn; {REMEDY}")
        return found


def _between(starts: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The part of a sorted, memory-mapped index from `start` up to `stop`."""
    # Numbers of the index's own dtype: for any other, NumPy would convert the whole index.
    low, high = np.searchsorted(starts, np.array([start, stop], dtype=starts.dtype))
    return starts[low:high].astype(np.int64)
