"""The second pass: the inputs once more, in segments of bounded size that are encoded one by one.

Where segments begin depends on the inputs alone, so work on them can be shared out, stopped and
gone on with, and their tokens in order are always the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from openpalm.data.corpus.document import FINGERPRINT, Document, Fingerprint, id_lengths
from openpalm.data.corpus.document_reader import (
    DocumentBlock,
    documents,
    read_document_blocks,
    read_pieces,
)
from openpalm.data.corpus.sources import Source
from openpalm.data.dataset.manifest import SPLITS
from openpalm.data.prepare.progress_file import Scanned
from openpalm.data.prepare.scan import COUNT_BYTES, COUNTS, RECORDS
from openpalm.data.prepare.split import FATES, LEFT_OUT, SLICE, TRAIN, VAL, Plan
from openpalm.data.text.byte_level import split_at_safe_points
from openpalm.errors import DataError


@dataclass(frozen=True, slots=True)
class Share:
    """Job `index` of `count`, counted from 0, by where in the kept text a segment begins.

    `total` is the bytes of that text.
    """

    index: int
    count: int
    total: int

    def has(self, position: int) -> bool:
        return self._of(position) == self.index

    def meets(self, begin: int, end: int) -> bool:
        return self._of(begin) <= self.index <= self._of(end)

    def _of(self, position: int) -> int:
        return min(position * self.count // max(1, self.total), self.count - 1)


class Segment(NamedTuple):
    """Some documents, or one piece of a long one, and what is planned for them.

    seam: (document, byte) where it lies inside a document here. A piece of a document that does
    not start or end here has no record of its own: whoever cut it checks the whole.
    """

    source: int
    number: int
    block: DocumentBlock
    records: np.ndarray | None
    fates: np.ndarray
    seam: tuple[int, int] | None
    starts: bool = True
    ends: bool = True


class Part(NamedTuple):
    """A document, or the part of it in one segment on one side of the seam."""

    split: str
    piece: Document
    size: int
    starts: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of the inputs that were scanned into `folder`.

    `in_pieces` says whether a long text may be cut: whether its ids are those of its pieces.
    `lengths` is
    Fingerprint's; `advance` is told the raw bytes read.
    """

    sources: Sequence[Source]
    scanned: Sequence[Scanned]
    plan: Plan
    folder: Path
    in_pieces: bool
    lengths: np.ndarray | None
    end_of_text: int | None
    advance: Callable[[int], None]

    def read(self, share: Share, begin: tuple[int, int] = (0, 0)) -> Iterator[Segment]:
        """Those of a share, from (source, segment) on, that hold something to keep.

        Raises DataError where an input is not what the first pass saw.
        """
        document = block = position = 0
        for number, (source, found) in enumerate(zip(self.sources, self.scanned, strict=True)):
            kept = self._kept_bytes(document, found.documents)
            if number >= begin[0] and share.meets(position, position + kept):
                cut = self._cut if source.is_one else self._blocks
                for segment, at in cut(number, document, block):
                    after = (number, segment.number) >= begin
                    if after and share.has(position + at) and segment.fates.any():
                        yield segment
            else:
                self.advance(found.bytes)
            document += found.documents
            block += found.blocks
            position += kept

    def _blocks(self, source: int, document: int, block: int) -> Iterator[tuple[Segment, int]]:
        """The segments of a source of many documents, and the kept bytes before each."""
        given, found, at = self.sources[source], self.scanned[source], 0
        counts = np.fromfile(self.folder / COUNTS, "<i8", found.blocks, offset=block * COUNT_BYTES)
        blocks = read_document_blocks(given, self._tap)
        number = -1
        for number, content in enumerate(blocks):
            if number >= len(counts):
                refuse_changed(given.name)
            records, fates = self._read(document, int(counts[number]))
            seam = self.plan.seam
            inside = seam and 0 <= seam[0] - document < len(fates)
            local = (seam[0] - document, seam[1]) if seam and inside else None
            yield Segment(source, number, content, records, fates, local), at
            document += len(fates)
            at += int(records["size"][fates != LEFT_OUT].sum())
        if number + 1 != len(counts):
            refuse_changed(given.name)

    def _cut(self, source: int, document: int, block: int) -> Iterator[tuple[Segment, int]]:
        """The segments of one long document, and its bytes before each."""
        given, (records, fates) = self.sources[source], self._read(document, 1)
        seam = self.plan.seam
        cut = seam[1] if seam and seam[0] == document else None
        measure, at, ended = Fingerprint(self.lengths), 0, True
        pieces = _seamed(read_pieces(given, self._tap), self.in_pieces)
        for number, (piece, last) in enumerate(pieces):
            measure.add(piece)
            size = measure.size - at
            inside = cut is not None and at < cut < at + size
            behind = cut is not None and cut <= at
            yield (
                Segment(
                    source,
                    number,
                    [piece],
                    None,
                    np.full_like(fates, VAL) if behind else fates,
                    (0, cut - at) if cut is not None and inside else None,
                    starts=ended or at == cut,
                    ends=last,
                ),
                at,
            )
            at += size
            ended = piece.ids is not None and piece.ids[-1] == self.end_of_text
        if measure.value()[0] != tuple(records["digest"][0].tolist()):
            refuse_changed(given.name)

    def _tap(self, data: bytes) -> None:
        self.advance(len(data))

    def _kept_bytes(self, first: int, count: int) -> int:
        total = 0
        for start in range(first, first + count, SLICE):
            records, fates = self._read(start, min(SLICE, first + count - start))
            total += int(records["size"][fates != LEFT_OUT].sum())
        return total

    def _read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        offset = first * FINGERPRINT.itemsize
        records = np.fromfile(self.folder / RECORDS, FINGERPRINT, count, offset=offset)
        return records, np.fromfile(self.folder / FATES, np.uint8, count, offset=first)


def parts(segment: Segment, lengths: np.ndarray | None) -> Iterator[Part]:
    """What is kept of a segment, each document checked to be what the first pass saw."""
    count = 0
    for count, document in enumerate(documents(segment.block), start=1):
        i = count - 1
        measure = Fingerprint(lengths)
        measure.add(document)
        if segment.records is not None and (
            i >= len(segment.records)
            or measure.value()[0] != tuple(segment.records["digest"][i].tolist())
        ):
            refuse_changed(document.place)
        if segment.seam and i == segment.seam[0]:
            yield from _sides(document, segment.seam[1], segment, lengths)
        elif segment.fates[i]:
            split = SPLITS[segment.fates[i] - TRAIN]
            yield Part(split, document, measure.size, segment.starts, segment.ends)
    if count != len(segment.fates):
        refuse_changed("an input")


def refuse_changed(source: str) -> NoReturn:
    raise DataError(f"{source}: changed while it was being read; repeat the command")


def _seamed(pieces: Iterable[Document], in_pieces: bool) -> Iterator[tuple[Document, bool]]:
    """Pieces cut where no token can lie, and whether each is the last."""
    texts, waiting, source, ids = [], 0, "", None
    for piece in pieces:
        source = piece.place
        if piece.ids is not None:
            if ids is not None:
                yield ids, False
            ids = piece
            continue
        texts.append(piece.text)
        waiting += 1
        # Where there is no seam, the next attempt waits for twice the text.
        if in_pieces and waiting & (waiting - 1) == 0:
            *ready, rest = split_at_safe_points("".join(texts))
            texts = [rest]
            if ready:
                yield Document("".join(ready), source), False
                waiting = 0
    yield ids or Document("".join(texts), source), True


def _sides(
    document: Document, seam: int, segment: Segment, lengths: np.ndarray | None
) -> Iterator[Part]:
    """The training and the validation part of the document that the seam lies in."""
    if document.ids is not None:
        sizes = np.cumsum(id_lengths(document, lengths))
        at = int(np.searchsorted(sizes, seam, side="right"))
        head, tail = (replace(document, ids=ids) for ids in (document.ids[:at], document.ids[at:]))
        whole, before = int(sizes[-1]), int(sizes[at - 1]) if at else 0
    else:
        data = document.text.encode()
        # Never inside a character: continuation bytes of UTF-8 look like 10xxxxxx.
        while seam and data[seam] & 0xC0 == 0x80:
            seam -= 1
        head, tail = (replace(document, text=t.decode()) for t in (data[:seam], data[seam:]))
        whole, before = len(data), seam
    if before:
        yield Part("train", head, before, segment.starts, False)
    yield Part("val", tail, whole - before, True, segment.ends)
