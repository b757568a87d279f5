"""Exact duplicates: documents whose text an earlier document has, found by their digests.

Digests are sorted one bucket at a time on disk, so memory does not grow with their number.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

BUCKET_DOCUMENTS = 1 << 20
MAX_BUCKETS = 256
_NUMBERED = np.dtype([("digest", "<u8", (2,)), ("number", "<i8")])


def repeated_documents(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], count: int, folder: Path
) -> Iterator[np.ndarray]:
    """The numbers of all documents that repeat an earlier one, as several arrays.

    documents: in order, slices of (numbers int64 [n], digests uint64 [n, 2]); count: of all of
    them, approximately. Buckets are written to `folder` and removed.
    """
    paths = _write_buckets(documents, min(MAX_BUCKETS, 1 + count // BUCKET_DOCUMENTS), folder)
    for path in paths:
        rows = np.fromfile(path, _NUMBERED)
        path.unlink()
        digests = rows["digest"]
        # lexsort is stable: of equal digests the first document stays first, and is kept.
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
        yield rows["number"][order[1:][repeats]]


def _write_buckets(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], buckets: int, folder: Path
) -> list[Path]:
    """Equal digests go to the same bucket."""
    paths = [folder / f"bucket-{i}.partial" for i in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for numbers, digests in documents:
            rows = np.empty(len(numbers), dtype=_NUMBERED)
            rows["digest"], rows["number"] = digests, numbers
            bucket = digests[:, 1] % np.uint64(buckets)
            for i in np.unique(bucket):
                files[i].write(rows[bucket == i].tobytes())
    return paths
