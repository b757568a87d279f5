"""The first pass over the documents: each one validated, hashed, counted and given its split.

Nothing is written. What it keeps is some thirty bytes a document, however long the texts are.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from openpalm.data.corpus import Document, Source, read_source
from openpalm.data.manifest import DocumentCounts, InputEntry
from openpalm.errors import DataError

# With fewer documents, a share of them taken by hash is too far from the share asked for.
HASHED_DOCUMENTS = 200
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What the second pass does with the documents, in the order they are read.

    digests: uint64 [documents, 2]; keep, val: bool [documents]; seam: the document cut in two and
    how many of its UTF-8 bytes are training text, where the tail is the validation split.
    """

    inputs: tuple[InputEntry, ...]
    counts: DocumentCounts
    digests: np.ndarray
    keep: np.ndarray
    val: np.ndarray
    seam: tuple[int, int] | None
    split_by: str


class Part(NamedTuple):
    """A document, or the part of it on one side of the seam."""

    split: str
    text: str
    size: int  # UTF-8 bytes
    starts: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the scan remembers: 16 digest bytes and the size of each document; blank ones by -1."""

    digests: bytearray
    sizes: array


def scan(
    sources: Sequence[Source],
    *,
    text_field: str,
    val_fraction: float,
    tail_fraction: float | None,
    dedup: bool,
    advance: Callable[[int], None],
) -> Plan:
    """Reads everything once. Raises DataError on the first thing that cannot be used.

    `advance` is told the raw bytes read; `tail_fraction` asks for the tail as validation split.
    """
    seen = _Seen(bytearray(), array("q"))
    inputs = tuple(
        _scan_input(given, group, seen, text_field, advance)
        for given, group in groupby(sources, key=lambda source: source.given)
    )
    digests = np.frombuffer(bytes(seen.digests), dtype="<u8").reshape(-1, 2)
    sizes = np.frombuffer(seen.sizes, dtype=np.int64)
    blank = sizes < 0
    repeated = _repeated(digests) & ~blank if dedup else np.zeros_like(blank)
    keep = ~blank & ~repeated
    if not keep.any():
        given = ", ".join(entry.given for entry in inputs)
        raise DataError(f"{given}: no text in {len(keep)} documents; give other inputs")
    counts = DocumentCounts(len(keep), int(repeated.sum()), int(blank.sum()))
    if tail_fraction is None and keep.sum() < HASHED_DOCUMENTS:
        tail_fraction = val_fraction
    if tail_fraction is None:
        val = _by_hash(digests, keep, val_fraction)
        return Plan(inputs, counts, digests, keep, val, None, "hash")
    val, seam = _by_tail(np.where(keep, sizes, 0), tail_fraction)
    return Plan(inputs, counts, digests, keep, val, seam, "tail")


def parts(plan: Plan, documents: Iterable[Document]) -> Iterator[Part]:
    """The second reading, each document checked to be what the scan saw."""
    count = 0
    for count, document in enumerate(documents, start=1):
        data = document.text.encode()
        i = count - 1
        if i >= len(plan.keep) or _digest(data) != plan.digests[i].tobytes():
            _refuse_changed(document.source)
        if plan.seam and i == plan.seam[0]:
            yield from _cut(data, plan.seam[1])
        elif plan.keep[i]:
            split = "val" if plan.val[i] else "train"
            yield Part(split, document.text, len(data), True, True)
    if count != len(plan.keep):
        _refuse_changed("an input")


def _scan_input(
    given: str,
    sources: Iterable[Source],
    seen: _Seen,
    text_field: str,
    advance: Callable[[int], None],
) -> InputEntry:
    digests: list[str] = []
    total = 0
    for source in sources:
        digest = hashlib.sha256()

        def tap(data: bytes, digest: "hashlib._Hash" = digest) -> None:
            nonlocal total
            digest.update(data)
            total += len(data)
            advance(len(data))

        for document in read_source(source, text_field=text_field, tap=tap):
            data = document.text.encode()
            seen.digests.extend(_digest(data))
            seen.sizes.append(len(data) if document.text.strip() else -1)
        digests.append(digest.hexdigest())
    listing = "".join(f"{digest}\n" for digest in digests).encode()
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(listing).hexdigest()
    return InputEntry(given, len(digests), total, whole)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _repeated(digests: np.ndarray) -> np.ndarray:
    """bool [documents]: whether an earlier document has the same digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equals comes first
    ordered = digests[order]
    repeated = np.zeros(len(digests), dtype=bool)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return repeated


def _by_hash(digests: np.ndarray, keep: np.ndarray, fraction: float) -> np.ndarray:
    """bool [documents]: the text alone decides, so a document never changes sides."""
    draw = digests[:, 0]
    val = keep & (draw < np.uint64(fraction * 2.0**64))
    if not val.any():
        val = keep & (draw == draw[keep].min())
    if val.sum() == keep.sum():
        raise DataError(
            f"val_fraction {fraction}: leaves no document to train on; use a smaller one"
        )
    return val


def _by_tail(sizes: np.ndarray, fraction: float) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The documents wholly behind the seam, and the seam where it lies inside one."""
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    seam = total - max(1, round(total * fraction))
    val = (ends - sizes >= seam) & (sizes > 0)
    inside = np.flatnonzero((ends - sizes < seam) & (seam < ends))
    if not len(inside):
        return val, None
    i = int(inside[0])
    return val, (i, seam - int(ends[i] - sizes[i]))


def _cut(data: bytes, seam: int) -> Iterator[Part]:
    # Never inside a character: continuation bytes of UTF-8 look like 10xxxxxx.
    while seam and data[seam] & 0xC0 == 0x80:
        seam -= 1
    head, tail = data[:seam], data[seam:]
    if head:
        yield Part("train", head.decode(), len(head), True, False)
    yield Part("val", tail.decode(), len(tail), True, True)


def _refuse_changed(source: str) -> None:
    raise DataError(f"{source}: changed while it was being read; repeat the command")
