"""First pass of `data prepare`: validates, hashes and counts every document.

It leaves 24 bytes a document on disk, so memory does not grow with the inputs. After a kill,
sources already scanned are not parsed again: only their raw bytes are compared with their hash.
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
from openpalm.data.prepare.progress_file import ScannedSource, ScanPosition, UnfinishedDataset
from openpalm.errors import DataError

MEASURES = "documents.partial"
"""scratch file: digest and size (FINGERPRINT) of each document"""
COUNTS = "blocks.partial"
"""scratch file: number of documents in each block (int64)"""
COUNT_BYTES = 8

Advance = Callable[[int], None]


class RawHash:
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
    unfinished: UnfinishedDataset,
    workers: Workers,
    *,
    lengths: np.ndarray | None,
    advance: Advance,
) -> list[ScannedSource]:
    """Reads all sources once. Raises DataError on the first document that cannot be used.

    Writes the files MEASURES and COUNTS. `lengths` is that of Fingerprint; `advance` gets the
    number of raw bytes read.
    """
    progress = unfinished.progress
    # A changed source is an error of the request that must not cost the work done so far.
    unfinished.keep = True
    for source, before in zip(sources, progress.scanned, strict=False):
        _refuse_changed_source(source, before, advance)
    unfinished.keep = False
    with (
        _resumed_file(unfinished, MEASURES, "documents", FINGERPRINT.itemsize) as measures,
        _resumed_file(unfinished, COUNTS, "blocks", COUNT_BYTES) as counts,
    ):
        for source in sources[len(progress.scanned) :]:
            raw, position = RawHash(advance), progress.scanning
            blocks = _measured(source, workers, lengths, raw, position.blocks)
            for measured in blocks:
                measures.write(measured.tobytes())
                done = 0
                if not source.is_one:
                    counts.write(len(measured).to_bytes(COUNT_BYTES, "little"))
                    done = position.blocks + 1
                position = ScanPosition(position.documents + len(measured), done)
                # A source that is one document is scanned again as a whole: it has no blocks.
                if unfinished.is_due() and not source.is_one:
                    unfinished.note(position)
                    unfinished.checkpoint(measures, counts)
            refuse_empty(source, position.documents)
            scanned = ScannedSource(
                source.name, raw.bytes, raw.sha256, position.documents, position.blocks
            )
            progress.scanned.append(scanned)
            progress.scanning = ScanPosition(0, 0)
            unfinished.note(scanned)
            if unfinished.is_due():
                unfinished.checkpoint(measures, counts)
        unfinished.checkpoint(measures, counts)
    return progress.scanned


def input_entries(
    sources: Sequence[Source], scanned: Sequence[ScannedSource]
) -> tuple[InputEntry, ...]:
    """The manifest's entry of each input, which may be several sources (a folder, a glob)."""
    pairs = zip(sources, scanned, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0].given)
    return tuple(_entry(given, [found for _, found in group]) for given, group in groups)


def hash_source(source: Source, advance: Advance) -> ScannedSource:
    """Hashes the raw bytes of a source; parses only sources that have no file."""
    raw = RawHash(advance)
    if source.path:
        tap_file(source.path, raw)
    else:
        for _ in read_document_blocks(source, raw):
            pass
    return ScannedSource(source.name, raw.bytes, raw.sha256, 0, 0)


def _entry(given: str, scanned: Sequence[ScannedSource]) -> InputEntry:
    listing = "".join(f"{one.sha256}\n" for one in scanned).encode()
    whole = scanned[0].sha256 if len(scanned) == 1 else hashlib.sha256(listing).hexdigest()
    return InputEntry(given, len(scanned), sum(one.bytes for one in scanned), whole)


def _measured(
    source: Source,
    workers: Workers,
    lengths: np.ndarray | None,
    tap: RawHash,
    begin: int,
) -> Iterator[np.ndarray]:
    """FINGERPRINT [documents] of each block from number `begin` on."""
    if source.is_one:
        measure = Fingerprint(lengths)
        for piece in read_pieces(source, tap):
            measure.add(piece)
        yield np.array([measure.value()], dtype=FINGERPRINT)
    else:
        # Blocks before `begin` are read for the raw hash, and not parsed.
        blocks = read_document_blocks(source, tap)
        measure_block = partial(_measure_block, lengths=lengths)
        yield from workers.map(measure_block, islice(blocks, begin, None))


def _measure_block(block: DocumentBlock, *, lengths: np.ndarray | None) -> np.ndarray:
    measured = []
    for document in documents(block):
        measure = Fingerprint(lengths)
        measure.add(document)
        measured.append(measure.value())
    return np.array(measured, dtype=FINGERPRINT)


def _refuse_changed_source(source: Source, before: ScannedSource, advance: Advance) -> None:
    """Sources without a file (Hub, built-in) are checked when the second pass reads them."""
    if source.path and (now := hash_source(source, advance)).sha256 != before.sha256:
        raise DataError(
            f"{now.name}: changed since this dataset was begun; give what it was, choose another "
            f"--out, or {REMEDY}"
        )


@contextmanager
def _resumed_file(
    unfinished: UnfinishedDataset, name: str, unit: str, size: int
) -> Iterator[BinaryIO]:
    """A scratch file opened for appending, after cutting it to the length in the progress file.

    unit: "documents" or "blocks", of which the file has `size` bytes each.
    """
    progress = unfinished.progress
    counted = [*progress.scanned, progress.scanning]
    known = size * sum(getattr(position, unit) for position in counted)
    with (unfinished.folder / name).open("ab") as file:
        if file.tell() < known:
            raise DataError(f"{file.name}: is torn; {REMEDY}")
        file.truncate(known)
        yield file
