"""What a corpus is made of, and what the first pass remembers of it."""

import hashlib
from dataclasses import dataclass

import numpy as np

from openpalm.errors import DataError

# 24 bytes a document. `size` counts UTF-8 bytes of text; -1 for a blank document.
FINGERPRINT = np.dtype([("digest", "<u8", (2,)), ("size", "<i8")])
IDS_REMEDY = "name the tokenizer they were made with: --tokenizer PATH/tokenizer.json"


@dataclass(frozen=True, slots=True)
class Document:
    """One text; `source` says where it came from ("path", "path:line"), for messages.

    Where it was already tokenised, `ids` (uint32) stand for it and `text` is empty.
    """

    text: str
    place: str
    ids: np.ndarray | None = None


class Fingerprint:
    """The record of a document that comes in one piece or many.

    `lengths` gives the text bytes of each id of the vocabulary; None where ids are not allowed.
    `size` is the bytes so far.
    """

    def __init__(self, lengths: np.ndarray | None = None):
        self._lengths, self.size, self._blank = lengths, 0, True
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, piece: Document) -> None:
        """Raises DataError for ids that no given vocabulary has."""
        if piece.ids is None:
            data = piece.text.encode()
            self._hash.update(data)
            self.size += len(data)
            self._blank = self._blank and (not data or piece.text.isspace())
        elif len(piece.ids):
            if not self.size:  # no text has the digest of ids
                self._hash = hashlib.blake2b(digest_size=16, person=b"token ids")
            self._hash.update(piece.ids.astype("<u4").tobytes())
            self.size += int(id_lengths(piece, self._lengths).sum())
            self._blank = False

    def value(self) -> tuple[tuple[int, int], int]:
        digest = self._hash.digest()
        low, high = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        return (low, high), -1 if self._blank else self.size


def id_lengths(document: Document, lengths: np.ndarray | None) -> np.ndarray:
    """int64 [ids]: the bytes of text that each id of a document stands for."""
    assert document.ids is not None
    if lengths is None:
        raise DataError(f"{document.place}: holds token ids, not text; {IDS_REMEDY}")
    largest = int(document.ids.max(initial=0))
    if largest >= len(lengths):
        raise DataError(
            f"{document.place}: holds id {largest}, the vocabulary ends at {len(lengths) - 1}; "
            + IDS_REMEDY
        )
    return lengths[document.ids]
