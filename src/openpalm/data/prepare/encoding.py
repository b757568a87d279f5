"""A segment's text as token ids: the work that workers share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openpalm.data.dataset.manifest import SPLITS
from openpalm.data.prepare.segments import Part, Segment, parts
from openpalm.data.text.tokenizer import Tokenizer

# What is encoded at once: the library holds some hundred bytes a token meanwhile.
BATCH_CHARACTERS = 1 << 18


class Encoded(NamedTuple):
    """Tokens of one split; documents start at `starts` (int64).

    `size` is the bytes of text that the tokens stand for, `lost` those that no token spells.
    """

    tokens: np.ndarray
    starts: np.ndarray
    size: int
    lost: int


class _Piece(NamedTuple):
    text: str
    ids: np.ndarray | None
    starts: bool
    end: bool  # whether the end marker follows


@dataclass(frozen=True, slots=True)
class Encoder:
    """Segment -> (its source, its number, what each split gets of it).

    Text that was already ids gets no end marker.
    """

    tokenizer: Tokenizer
    dtype: str
    lengths: np.ndarray | None

    def __call__(self, segment: Segment) -> tuple[int, int, dict[str, Encoded]]:
        found = list(parts(segment, self.lengths))
        encoded = {
            split: self._encoded([part for part in found if part.split == split])
            for split in SPLITS
        }
        return segment.source, segment.number, encoded

    def _encoded(self, found: list[Part]) -> Encoded:
        tokens, starts, length, lost = [], [], 0, 0
        for batch in _batches(self._pieces(found)):
            texts = [piece.text for piece in batch if piece.ids is None]
            rows = iter(self.tokenizer.encode_batch(texts))
            for piece in batch:
                ids = piece.ids
                if ids is None:
                    ids = next(rows)
                    lost += self.tokenizer.lost_bytes(piece.text, ids)
                if piece.starts:
                    starts.append(length)
                tokens.append(np.array(ids, dtype=self.dtype))
                if piece.end:
                    tokens.append(np.array([self.tokenizer.end_of_text], dtype=self.dtype))
                length += len(ids) + piece.end
        joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=self.dtype)
        # A document of no token at all leaves no trace.
        begun = np.unique(np.array(starts, dtype=np.int64))
        size = sum(part.size for part in found)
        return Encoded(joined, begun[begun < length], size - lost, lost)

    def _pieces(self, found: list[Part]) -> Iterator[_Piece]:
        marked = self.tokenizer.end_of_text is not None
        for part in found:
            ids = part.piece.ids
            if ids is not None:
                yield from self._runs(ids, part.starts)
                continue
            texts = self.tokenizer.cut(part.piece.text)
            for i, text in enumerate(texts):
                end = part.ends and i == len(texts) - 1
                yield _Piece(text, None, part.starts and i == 0, end and marked)

    def _runs(self, ids: np.ndarray, starts: bool) -> Iterator[_Piece]:
        """Ids as they are, in documents that end behind each end marker."""
        ends = np.flatnonzero(ids == self.tokenizer.end_of_text) + 1
        for i, run in enumerate(np.split(ids, ends)):
            yield _Piece("", run, starts or i > 0, False)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
