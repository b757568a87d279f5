"""What becomes of each document: left out, training or validation; decided from the records alone.

Works through files in slices, so memory does not grow with the number of documents.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpalm.data.corpus.document import FINGERPRINT
from openpalm.data.dataset.manifest import SPLITS, DocumentCounts
from openpalm.errors import DataError, count_of

FATES = "fates.partial"
LEFT_OUT, TRAIN, VAL = 0, 1, 2
# With fewer documents, a share of them taken by hash is too far from the share asked for.
HASHED_DOCUMENTS = 200
SLICE = 1 << 18
# Duplicates are looked for in one bucket of digests at a time.
BUCKET_DOCUMENTS = 1 << 20
MAX_BUCKETS = 256
NUMBERED = np.dtype([("digest", "<u8", (2,)), ("number", "<i8")])


@dataclass(frozen=True, slots=True)
class Plan:
    """What the second pass does with the documents, in the order they are read.

    Beside it, FATES has a byte a document. seam: the document cut in two and how many of its bytes
    are training text, where the tail is the validation split; bytes: of all text that is kept.
    """

    counts: DocumentCounts
    seam: tuple[int, int] | None
    split_by: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """How to split: `tail` asks for the tail; `own` gives the split of each document."""

    fraction: float
    tail: float | None
    own: Sequence[str] | None


def decide(folder: Path, records: Path, split: Split, *, dedup: bool, given: str) -> Plan:
    """Writes FATES to `folder`. Raises DataError, naming `given`, where a split would be empty."""
    ledger = Ledger(records, folder / FATES)
    if not len(ledger):
        raise DataError(f"{given}: no text in 0 documents; give other inputs")
    blank = ledger.begin()
    if dedup and not split.own:
        for numbers in _repeated(ledger, folder):
            ledger.fates[numbers] = LEFT_OUT
    kept = sum(int((fates != LEFT_OUT).sum()) for _, fates in ledger)
    size = sum(int(records["size"][fates != LEFT_OUT].sum()) for records, fates in ledger)
    if not kept:
        documents = count_of(len(ledger), "document")
        raise DataError(f"{given}: no text in {documents}; give other inputs")
    counts = DocumentCounts(len(ledger), len(ledger) - kept - blank, blank)
    tail = split.fraction if split.tail is None and kept < HASHED_DOCUMENTS else split.tail
    seam, split_by = None, "hash"
    if split.own:
        split_by = "files"
        ledger.fates[:] = [SPLITS.index(own) + TRAIN for own in split.own]
    elif tail is None:
        _by_hash(ledger, kept, split.fraction)
    else:
        split_by, seam = "tail", _by_tail(ledger, size, tail)
    ledger.fates.flush()
    return Plan(counts, seam, split_by, size)


class Ledger:
    """Records and fates side by side, a slice at a time: (FINGERPRINT [n], uint8 [n])."""

    def __init__(self, records: Path, fates: Path):
        self._records, self._fates = records, fates
        self._count = records.stat().st_size // FINGERPRINT.itemsize

    def __len__(self) -> int:
        return self._count

    def begin(self) -> int:
        """Every document to train on, but the blank ones; how many those are."""
        self.fates = np.memmap(self._fates, dtype=np.uint8, mode="w+", shape=(len(self),))
        blank = 0
        for records, fates in self:
            fates[:] = np.where(records["size"] < 0, LEFT_OUT, TRAIN)
            blank += int((fates == LEFT_OUT).sum())
        return blank

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, self._count, SLICE):
            count = min(SLICE, self._count - start)
            yield self.read(start, count), self.fates[start : start + count]

    def read(self, start: int, count: int) -> np.ndarray:
        return np.fromfile(self._records, FINGERPRINT, count, offset=start * FINGERPRINT.itemsize)


def _repeated(ledger: Ledger, folder: Path) -> Iterator[np.ndarray]:
    """The numbers of documents that an earlier one has the digest of, a bucket at a time."""
    buckets = min(MAX_BUCKETS, 1 + len(ledger) // BUCKET_DOCUMENTS)
    paths = [folder / f"bucket-{i}.partial" for i in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        start = 0
        for records, fates in ledger:
            rows = np.empty(len(records), dtype=NUMBERED)
            rows["digest"] = records["digest"]
            rows["number"] = np.arange(start, start + len(rows))
            rows = rows[fates != LEFT_OUT]
            which = rows["digest"][:, 1] % np.uint64(buckets)
            for i in np.unique(which):
                files[i].write(rows[which == i].tobytes())
            start += len(records)
    for path in paths:
        rows = np.fromfile(path, NUMBERED)
        path.unlink()
        digests = rows["digest"]
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equals is first
        ordered = digests[order]
        yield rows["number"][order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]]


def _by_hash(ledger: Ledger, kept: int, fraction: float) -> None:
    """The text alone decides, so a document never changes sides."""
    limit, smallest, held = np.uint64(fraction * 2.0**64), np.uint64(2**64 - 1), 0
    for records, fates in ledger:
        draw = records["digest"][:, 0]
        val = (fates == TRAIN) & (draw < limit)
        smallest = min(smallest, draw[fates == TRAIN].min(initial=smallest))
        fates[val] = VAL
        held += int(val.sum())
    if not held:
        for records, fates in ledger:
            val = (fates == TRAIN) & (records["digest"][:, 0] == smallest)
            fates[val] = VAL
            held += int(val.sum())
    if held == kept:
        raise DataError(
            f"val_fraction {fraction}: leaves no document to train on; use a smaller one"
        )


def _by_tail(ledger: Ledger, total: int, fraction: float) -> tuple[int, int] | None:
    """The documents wholly behind the seam, and the seam where it lies inside one."""
    seam = total - max(1, round(total * fraction))
    found, before, start = None, 0, 0
    for records, fates in ledger:
        sizes = np.where(fates == TRAIN, records["size"], 0)
        ends = before + np.cumsum(sizes)
        fates[(ends - sizes >= seam) & (sizes > 0)] = VAL
        inside = np.flatnonzero((ends - sizes < seam) & (seam < ends))
        if len(inside):
            i = int(inside[0])
            found = (start + i, seam - int(ends[i] - sizes[i]))
        before, start = int(ends[-1]), start + len(records)
    return found
