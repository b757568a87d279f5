"""The first pass: every document validated, hashed and counted, 24 bytes of each kept on disk.

Memory does not grow with the inputs. What was scanned before a kill is not parsed again: its raw
bytes are only compared with their hash.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from typing import BinaryIO

import numpy as np

from openpalm.base.workers import Workers
from openpalm.data.corpus.document import FINGERPRINT, Fingerprint
from openpalm.data.corpus.document_reader import (
    DocumentBlock,
    documents,
    read_document_blocks,
    read_pieces,
    refuse_empty,
)
from openpalm.data.corpus.line_streams import tap_file
from openpalm.data.corpus.sources import Source
from openpalm.data.dataset.manifest import REMEDY, InputEntry
from openpalm.data.prepare.progress_file import Scanned, Scanning, Unfinished
from openpalm.errors import DataError

RECORDS = "documents.partial"
COUNTS = "blocks.partial"
COUNT_BYTES = 8

Advance = Callable[[int], None]


class Raw:
    """A tap that hashes and counts the raw bytes of a source."""

    def __init__(self, advance: Advance):
        self._sha256, self._advance, self.bytes = hashlib.sha256(), advance, 0

    def __call__(self, data: bytes) -> None:
        self._sha256.update(data)
        self.bytes += len(data)
        self._advance(len(data))

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def scan(
    sources: Sequence[Source],
    unfinished: Unfinished,
    workers: Workers,
    *,
    lengths: np.ndarray | None,
    advance: Advance,
) -> list[Scanned]:
    """Reads everything once. Raises DataError on the first thing that cannot be used.

    Leaves RECORDS (a FINGERPRINT a document) and COUNTS (documents of each block, int64).
    `lengths` is Fingerprint's; `advance` is told the raw bytes read.
    """
    done = unfinished.done
    unfinished.keep = True
    for source, before in zip(sources, done.scanned, strict=False):
        _compare(source, before, advance)
    unfinished.keep = False
    with (
        _grown(unfinished, RECORDS, "documents", FINGERPRINT.itemsize) as records,
        _grown(unfinished, COUNTS, "blocks", COUNT_BYTES) as counts,
    ):
        for source in sources[len(done.scanned) :]:
            raw, found = Raw(advance), done.scanning
            for measured in _measured(source, workers, lengths, raw, found.blocks):
                records.write(measured.tobytes())
                blocks = 0
                if not source.is_one:
                    counts.write(len(measured).to_bytes(COUNT_BYTES, "little"))
                    blocks = found.blocks + 1
                found = Scanning(found.documents + len(measured), blocks)
                if unfinished.is_due() and not source.is_one:
                    unfinished.note(found)
                    unfinished.checkpoint(records, counts)
            refuse_empty(source, found.documents)
            row = Scanned(source.name, raw.bytes, raw.sha256, found.documents, found.blocks)
            done.scanned.append(row)
            done.scanning = Scanning(0, 0)
            unfinished.note(row)
            if unfinished.is_due():
                unfinished.checkpoint(records, counts)
        unfinished.checkpoint(records, counts)
    return done.scanned


def input_entries(sources: Sequence[Source], scanned: Sequence[Scanned]) -> tuple[InputEntry, ...]:
    """What the manifest says of each input, from what is known of each source."""
    pairs = zip(sources, scanned, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0].given)
    return tuple(_entry(given, [found for _, found in group]) for given, group in groups)


def hashed(source: Source, advance: Advance) -> Scanned:
    """A source's raw bytes only, nothing parsed that need not be."""
    raw = Raw(advance)
    if source.path:
        tap_file(source.path, raw)
    else:
        for _ in read_document_blocks(source, raw):
            pass
    return Scanned(source.name, raw.bytes, raw.sha256, 0, 0)


def _entry(given: str, found: Sequence[Scanned]) -> InputEntry:
    listing = "".join(f"{one.sha256}\n" for one in found).encode()
    whole = found[0].sha256 if len(found) == 1 else hashlib.sha256(listing).hexdigest()
    return InputEntry(given, len(found), sum(one.bytes for one in found), whole)


def _measured(
    source: Source,
    workers: Workers,
    lengths: np.ndarray | None,
    tap: Raw,
    begin: int,
) -> Iterator[np.ndarray]:
    """FINGERPRINT [documents] of each block from `begin` on."""
    if source.is_one:
        measure = Fingerprint(lengths)
        for piece in read_pieces(source, tap):
            measure.add(piece)
        yield np.array([measure.value()], dtype=FINGERPRINT)
    else:
        blocks = read_document_blocks(source, tap)
        measured = partial(_measure_block, lengths=lengths)
        yield from workers.map(measured, islice(blocks, begin, None))


def _measure_block(block: DocumentBlock, *, lengths: np.ndarray | None) -> np.ndarray:
    found = []
    for document in documents(block):
        measure = Fingerprint(lengths)
        measure.add(document)
        found.append(measure.value())
    return np.array(found, dtype=FINGERPRINT)


def _compare(source: Source, before: Scanned, advance: Advance) -> None:
    """What was scanned before a kill must still be what it was; the Hub's rows are met again."""
    if source.path and (now := hashed(source, advance)).sha256 != before.sha256:
        raise DataError(
            f"{now.name}: changed since this dataset was begun; give what it was, choose another "
            f"--out, or {REMEDY}"
        )


@contextmanager
def _grown(unfinished: Unfinished, name: str, unit: str, size: int) -> Iterator[BinaryIO]:
    """A scratch file, cut to what the journal knows, to be written on."""
    done = unfinished.done
    known = size * (sum(getattr(row, unit) for row in done.scanned) + getattr(done.scanning, unit))
    with (unfinished.folder / name).open("ab") as file:
        if file.tell() < known:
            raise DataError(f"{file.name}: is torn; {REMEDY}")
        file.truncate(known)
        yield file
