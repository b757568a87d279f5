"""Second pass of `data prepare`: reads the inputs again in segments, the unit of encoding.

A segment is a block of documents or one piece of a long document. Where segments begin depends on
the inputs alone. So they can be shared among jobs, encoded in parallel and resumed, and the tokens
in order are always the same.
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
from openpalm.data.prepare.progress_file import ScannedSource
from openpalm.data.prepare.scan import COUNT_BYTES, COUNTS, MEASURES
from openpalm.data.prepare.split import ASSIGNMENT, LEFT_OUT, SLICE, TRAIN, VAL, Assignment
from openpalm.data.text.byte_level import split_at_safe_points
from openpalm.errors import DataError


@dataclass(frozen=True, slots=True)
class JobShare:
    """The segments of job `index` (from 0) of `count`: those that begin in its part of the text.

    A job's part is one of `count` equal intervals of the `total` bytes of text that is kept.
    """

    index: int
    count: int
    total: int

    def contains(self, position: int) -> bool:
        return self._job_of(position) == self.index

    def overlaps(self, begin: int, end: int) -> bool:
        return self._job_of(begin) <= self.index <= self._job_of(end)

    def _job_of(self, position: int) -> int:
        # By the position in the text, not by documents: jobs get equal amounts of it.
        return min(position * self.count // max(1, self.total), self.count - 1)


class Segment(NamedTuple):
    """Some documents, or one piece of a long document, with their assignment to splits.

    boundary: (document, byte) where the split by tail cuts a document of this segment. A piece
    of a long document has measures None: `Segments._pieces` checks the whole document.
    """

    source: int
    number: int
    block: DocumentBlock
    measures: np.ndarray | None
    splits: np.ndarray
    boundary: tuple[int, int] | None
    starts: bool = True
    ends: bool = True


class Excerpt(NamedTuple):
    """The text of a document in one segment and in one split; `size` is its bytes.

    starts, ends: whether it has the document's first text, and its last.
    """

    split: str
    document: Document
    size: int
    starts: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class Segments:
    """Reads the segments of sources that were scanned into `folder`.

    in_pieces: whether a long text may be cut, since its ids are those of its pieces; lengths:
    that of Fingerprint; advance: gets the number of raw bytes read.
    """

    sources: Sequence[Source]
    scanned: Sequence[ScannedSource]
    assignment: Assignment
    folder: Path
    in_pieces: bool
    lengths: np.ndarray | None
    end_of_text: int | None
    advance: Callable[[int], None]

    def read(self, share: JobShare, begin: tuple[int, int] = (0, 0)) -> Iterator[Segment]:
        """The segments of a share from (source, segment) on that have text to keep.

        Raises DataError where an input changed since the first pass.
        """
        document = block = position = 0
        for number, (source, scanned) in enumerate(zip(self.sources, self.scanned, strict=True)):
            # Only kept text counts, so that jobs stay equal however much is left out.
            kept = self._kept_bytes(document, scanned.documents)
            # A source that lies wholly in other shares is not opened.
            if number >= begin[0] and share.overlaps(position, position + kept):
                cut = self._pieces if source.is_one else self._blocks
                for segment, before in cut(number, document, block):
                    # Encoded segments are read all the same: `before` depends on their sizes.
                    is_ahead = (number, segment.number) >= begin
                    if is_ahead and share.contains(position + before) and segment.splits.any():
                        yield segment
            else:
                # Counts as read, so that the progress reaches its total in every job.
                self.advance(scanned.bytes)
            document += scanned.documents
            block += scanned.blocks
            position += kept

    def _blocks(self, source: int, document: int, block: int) -> Iterator[tuple[Segment, int]]:
        """The segments of a source of many documents, and the kept bytes before each.

        document, block: the numbers of the source's first ones.
        """
        given, scanned = self.sources[source], self.scanned[source]
        counts = np.fromfile(
            self.folder / COUNTS, "<i8", scanned.blocks, offset=block * COUNT_BYTES
        )
        blocks = read_document_blocks(given, self._tap)
        number, before = -1, 0
        for number, content in enumerate(blocks):
            # More blocks than the first pass counted: the input grew.
            if number >= len(counts):
                refuse_changed(given.name)
            # Looked up by number: neither table is ever in memory whole.
            measures, splits = self._table(document, int(counts[number]))
            boundary = self.assignment.boundary
            is_inside = boundary and 0 <= boundary[0] - document < len(splits)
            # A segment numbers its documents from 0.
            local = (boundary[0] - document, boundary[1]) if boundary and is_inside else None
            yield Segment(source, number, content, measures, splits, local), before
            document += len(splits)
            before += int(measures["size"][splits != LEFT_OUT].sum())
        # Fewer blocks than the first pass counted: the input shrank.
        if number + 1 != len(counts):
            refuse_changed(given.name)

    def _pieces(self, source: int, document: int, block: int) -> Iterator[tuple[Segment, int]]:
        """The segments of one long document, and its bytes before each."""
        given, (measures, splits) = self.sources[source], self._table(document, 1)
        boundary = self.assignment.boundary
        cut = boundary[1] if boundary and boundary[0] == document else None
        measure, before, ended = Fingerprint(self.lengths), 0, True
        pieces = _cut_pieces(read_pieces(given, self._tap), self.in_pieces)
        for number, (piece, last) in enumerate(pieces):
            measure.add(piece)
            size = measure.size - before
            # At an end of the piece there is nothing to cut.
            is_cut = cut is not None and before < cut < before + size
            # A document that the boundary cuts is assigned to train: behind it comes validation.
            is_behind = cut is not None and cut <= before
            yield (
                Segment(
                    source,
                    number,
                    [piece],
                    None,
                    np.full_like(splits, VAL) if is_behind else splits,
                    (0, cut - before) if cut is not None and is_cut else None,
                    starts=ended or before == cut,
                    ends=last,
                ),
                before,
            )
            before += size
            # Ids bring their own end markers: behind one, a new document starts.
            ended = piece.ids is not None and piece.ids[-1] == self.end_of_text
        if measure.value()[0] != tuple(measures["digest"][0].tolist()):
            refuse_changed(given.name)

    def _tap(self, data: bytes) -> None:
        self.advance(len(data))

    def _kept_bytes(self, first: int, count: int) -> int:
        total = 0
        for start in range(first, first + count, SLICE):
            measures, splits = self._table(start, min(SLICE, first + count - start))
            total += int(measures["size"][splits != LEFT_OUT].sum())
        return total

    def _table(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Measures and splits of documents."""
        measures = np.fromfile(
            self.folder / MEASURES, FINGERPRINT, count, offset=start * FINGERPRINT.itemsize
        )
        return measures, np.fromfile(self.folder / ASSIGNMENT, np.uint8, count, offset=start)


def read_excerpts(segment: Segment, lengths: np.ndarray | None) -> Iterator[Excerpt]:
    """The text of a segment that is kept. Raises DataError where a document has changed.

    Text left out by deduplication is still parsed: the digests tell whether the input is the same.
    """
    count = 0
    for count, document in enumerate(documents(segment.block), start=1):
        i = count - 1
        measure = Fingerprint(lengths)
        # Measured again: a file that changed between the passes would get a wrong split.
        measure.add(document)
        if segment.measures is not None and (
            i >= len(segment.measures)
            or measure.value()[0] != tuple(segment.measures["digest"][i].tolist())
        ):
            refuse_changed(document.place)
        if segment.boundary and i == segment.boundary[0]:
            yield from _cut_at_boundary(document, segment.boundary[1], segment, lengths)
        elif segment.splits[i]:
            split = SPLITS[segment.splits[i] - TRAIN]
            yield Excerpt(split, document, measure.size, segment.starts, segment.ends)
    if count != len(segment.splits):
        refuse_changed("an input")


def refuse_changed(source: str) -> NoReturn:
    raise DataError(f"{source}: changed while it was being read; repeat the command")


def _cut_pieces(pieces: Iterable[Document], in_pieces: bool) -> Iterator[tuple[Document, bool]]:
    """The pieces of a document cut again at seams of its tokens, and whether each is the last.

    Pieces as read end anywhere; encoded one by one, a token that crosses an end would be lost.
    """
    texts, waiting, source, ids = [], 0, "", None
    for piece in pieces:
        source = piece.place
        if piece.ids is not None:
            # Ids need no seam; one piece is held back to know which is the last.
            if ids is not None:
                yield ids, False
            ids = piece
            continue
        texts.append(piece.text)
        waiting += 1
        # Only at powers of two: a text without a seam is joined and searched log times, not n.
        if in_pieces and waiting & (waiting - 1) == 0:
            *ready, rest = split_at_safe_points("".join(texts))
            texts = [rest]
            if ready:
                yield Document("".join(ready), source), False
                waiting = 0
    yield ids or Document("".join(texts), source), True


def _cut_at_boundary(
    document: Document, boundary: int, segment: Segment, lengths: np.ndarray | None
) -> Iterator[Excerpt]:
    """The training and the validation part of the document that the boundary cuts."""
    if document.ids is not None:
        sizes = np.cumsum(id_lengths(document, lengths))
        # An id cannot be cut: the one that crosses the boundary is validation.
        at = int(np.searchsorted(sizes, boundary, side="right"))
        head, tail = (replace(document, ids=ids) for ids in (document.ids[:at], document.ids[at:]))
        whole, before = int(sizes[-1]), int(sizes[at - 1]) if at else 0
    else:
        data = document.text.encode()
        # Back to the start of a character: continuation bytes of UTF-8 are 10xxxxxx.
        while boundary and data[boundary] & 0xC0 == 0x80:
            boundary -= 1
        head, tail = (
            replace(document, text=t.decode()) for t in (data[:boundary], data[boundary:])
        )
        whole, before = len(data), boundary
    # The boundary may have moved back to the start, which leaves no training part.
    if before:
        yield Excerpt("train", head, before, segment.starts, False)
    yield Excerpt("val", tail, whole - before, True, segment.ends)
