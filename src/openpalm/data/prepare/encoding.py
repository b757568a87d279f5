"""Encoding of segments as token ids, split by split: the work that threads share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openpalm.data.dataset.manifest import SPLITS
from openpalm.data.prepare.segments import Excerpt, Segment, read_excerpts
from openpalm.data.text.tokenizer import Tokenizer

# Encoded in one call: the tokenizers library needs about a hundred bytes per token meanwhile.
BATCH_CHARACTERS = 1 << 18


class Encoded(NamedTuple):
    """Tokens of one split; starts: int64, the positions where documents start.

    size: bytes of the text that the tokens spell; lost: bytes that the vocabulary cannot spell.
    """

    tokens: np.ndarray
    starts: np.ndarray
    size: int
    lost: int


class _Chunk(NamedTuple):
    """Text to encode, or ids to copy; `marked`: whether the end marker follows."""

    text: str
    ids: np.ndarray | None
    starts: bool
    marked: bool


@dataclass(frozen=True, slots=True)
class Encoder:
    """Segment -> (source, number, tokens for each split).

    Input that is already ids brings its own end markers and gets none.
    """

    tokenizer: Tokenizer
    dtype: str
    lengths: np.ndarray | None

    def __call__(self, segment: Segment) -> tuple[int, int, dict[str, Encoded]]:
        excerpts = list(read_excerpts(segment, self.lengths))
        encoded = {
            split: self._encode([excerpt for excerpt in excerpts if excerpt.split == split])
            for split in SPLITS
        }
        return segment.source, segment.number, encoded

    def _encode(self, excerpts: list[Excerpt]) -> Encoded:
        tokens, starts, length, lost = [], [], 0, 0
        for batch in _batches(self._chunks(excerpts)):
            texts = [chunk.text for chunk in batch if chunk.ids is None]
            encoded = iter(self.tokenizer.encode_batch(texts))
            for chunk in batch:
                ids = chunk.ids
                if ids is None:
                    ids = next(encoded)
                    lost += self.tokenizer.lost_bytes(chunk.text, ids)
                if chunk.starts:
                    starts.append(length)
                tokens.append(np.array(ids, dtype=self.dtype))
                if chunk.marked:
                    tokens.append(np.array([self.tokenizer.end_of_text], dtype=self.dtype))
                length += len(ids) + chunk.marked
        joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=self.dtype)
        # A document without a token shares its start with the next one, and is not counted.
        unique = np.unique(np.array(starts, dtype=np.int64))
        size = sum(excerpt.size for excerpt in excerpts)
        return Encoded(joined, unique[unique < length], size - lost, lost)

    def _chunks(self, excerpts: list[Excerpt]) -> Iterator[_Chunk]:
        has_marker = self.tokenizer.end_of_text is not None
        for excerpt in excerpts:
            ids = excerpt.document.ids
            if ids is not None:
                yield from self._id_chunks(ids, excerpt.starts)
                continue
            # Cut where no token can cross, so that a batch is bounded however long the text.
            texts = self.tokenizer.cut(excerpt.document.text)
            for i, text in enumerate(texts):
                ends = excerpt.ends and i == len(texts) - 1
                yield _Chunk(text, None, excerpt.starts and i == 0, ends and has_marker)

    def _id_chunks(self, ids: np.ndarray, starts: bool) -> Iterator[_Chunk]:
        """Ids cut into documents behind each end marker."""
        ends = np.flatnonzero(ids == self.tokenizer.end_of_text) + 1
        for i, document in enumerate(np.split(ids, ends)):
            yield _Chunk("", document, starts or i > 0, False)


def _batches(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Consecutive chunks of about BATCH_CHARACTERS of text together."""
    batch: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
