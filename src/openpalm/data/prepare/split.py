"""Assigns each document to train, to validation or to neither: by hash, by tail, or by its file.

Decided from digest and size of the documents alone. Files are processed in slices, so memory does
not grow with the number of documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpalm.data.corpus.document import FINGERPRINT
from openpalm.data.dataset.manifest import SPLITS, DocumentCounts
from openpalm.data.prepare.duplicates import repeated_documents
from openpalm.errors import DataError, count_of

ASSIGNMENT = "splits.partial"
"""file with one byte a document: LEFT_OUT, TRAIN or VAL"""
LEFT_OUT, TRAIN, VAL = 0, 1, 2
# With fewer documents, the share chosen by hash is too far from the share requested.
HASHED_DOCUMENTS = 200
SLICE = 1 << 18


@dataclass(frozen=True, slots=True)
class Split:
    """The requested split: by hash, or the tail of the text where `tail` is its fraction.

    own: the split of each document, where the inputs come split already, else empty.
    """

    fraction: float
    tail: float | None
    own: Sequence[str]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The result: what the second pass does with the documents, in the order they are read.

    boundary: the document that a split by tail cuts in two, and how many of its bytes are training
    text; bytes: of all text that is kept. The documents' own assignment is in the file ASSIGNMENT.
    """

    counts: DocumentCounts
    boundary: tuple[int, int] | None
    split_by: str
    bytes: int


def assign_splits(
    folder: Path, measures: Path, split: Split, *, dedup: bool, given: str
) -> Assignment:
    """Writes ASSIGNMENT to `folder`. Raises DataError naming `given` where a split would be empty.

    measures: file of a FINGERPRINT for each document.
    """
    table = DocumentTable(measures, folder / ASSIGNMENT)
    if not len(table):
        raise DataError(f"{given}: no text in 0 documents; give other inputs")
    blank = table.begin()
    # train.bin and val.bin come split already: nothing is moved or left out.
    if dedup and not split.own:
        for numbers in repeated_documents(_digests(table), len(table), folder):
            table.splits[numbers] = LEFT_OUT
    kept = sum(int((splits != LEFT_OUT).sum()) for _, splits in table)
    # Of kept text only: job shares and the tail's boundary count in these bytes.
    size = sum(int(measures["size"][splits != LEFT_OUT].sum()) for measures, splits in table)
    if not kept:
        documents = count_of(len(table), "document")
        raise DataError(f"{given}: no text in {documents}; give other inputs")
    counts = DocumentCounts(len(table), len(table) - kept - blank, blank)
    # With few documents a share by hash is far from the share asked for.
    tail = split.fraction if split.tail is None and kept < HASHED_DOCUMENTS else split.tail
    boundary, split_by = None, "hash"
    if split.own:
        split_by = "files"
        table.splits[:] = [SPLITS.index(own) + TRAIN for own in split.own]
    elif tail is None:
        _split_by_hash(table, kept, split.fraction)
    else:
        split_by, boundary = "tail", _split_by_tail(table, size, tail)
    table.splits.flush()
    return Assignment(counts, boundary, split_by, size)


class DocumentTable:
    """Iterates over documents in slices: FINGERPRINT [n] and writable splits, uint8 [n]."""

    def __init__(self, measures: Path, splits: Path):
        self._measures, self._path = measures, splits
        self._count = measures.stat().st_size // FINGERPRINT.itemsize

    def __len__(self) -> int:
        return self._count

    def begin(self) -> int:
        """Assigns every document to train, blank ones to neither; returns how many are blank."""
        # On disk: a byte per document, however many there are.
        self.splits = np.memmap(self._path, dtype=np.uint8, mode="w+", shape=(len(self),))
        blank = 0
        for measures, splits in self:
            splits[:] = np.where(measures["size"] < 0, LEFT_OUT, TRAIN)
            blank += int((splits == LEFT_OUT).sum())
        return blank

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, self._count, SLICE):
            count = min(SLICE, self._count - start)
            measures = np.fromfile(
                self._measures, FINGERPRINT, count, offset=start * FINGERPRINT.itemsize
            )
            yield measures, self.splits[start : start + count]


def _digests(table: DocumentTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and digests of the documents that are not blank."""
    start = 0
    for measures, splits in table:
        kept = np.flatnonzero(splits != LEFT_OUT)
        yield kept + start, measures["digest"][kept]
        start += len(measures)


def _split_by_hash(table: DocumentTable, kept: int, fraction: float) -> None:
    """The text alone decides: more documents later do not move one to the other split."""
    limit, smallest, held_out = np.uint64(fraction * 2.0**64), np.uint64(2**64 - 1), 0
    for measures, splits in table:
        # A digest is uniform, so comparing it with a limit draws that share of the documents.
        draw = measures["digest"][:, 0]
        val = (splits == TRAIN) & (draw < limit)
        # Kept in the same pass: whether any document is below is known only at its end.
        smallest = min(smallest, draw[splits == TRAIN].min(initial=smallest))
        splits[val] = VAL
        held_out += int(val.sum())
    # No document fell below the limit: the one nearest to it is held out.
    if not held_out:
        for measures, splits in table:
            val = (splits == TRAIN) & (measures["digest"][:, 0] == smallest)
            splits[val] = VAL
            held_out += int(val.sum())
    if held_out == kept:
        raise DataError(
            f"val_fraction {fraction}: leaves no document to train on; use a smaller one"
        )


def _split_by_tail(table: DocumentTable, total: int, fraction: float) -> tuple[int, int] | None:
    """Holds out the last `fraction` of the bytes; returns the boundary if a document is cut."""
    # At least one byte, or a small share of a small text would hold out nothing.
    boundary = total - max(1, round(total * fraction))
    cut, before, start = None, 0, 0
    for measures, splits in table:
        sizes = np.where(splits == TRAIN, measures["size"], 0)
        # Documents that are left out have size 0 here, so they move no boundary.
        ends = before + np.cumsum(sizes)
        splits[(ends - sizes >= boundary) & (sizes > 0)] = VAL
        # Both are strict: a boundary between two documents cuts neither.
        inside = np.flatnonzero((ends - sizes < boundary) & (boundary < ends))
        if len(inside):
            i = int(inside[0])
            cut = (start + i, boundary - int(ends[i] - sizes[i]))
        before, start = int(ends[-1]), start + len(measures)
    return cut
