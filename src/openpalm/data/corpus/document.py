"""A document of a corpus, and its fingerprint: digest and size, kept from the first pass."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpalm.base.console import names, shown
from openpalm.errors import DataError

FINGERPRINT = np.dtype([("digest", "<u8", (2,)), ("size", "<i8")])
"""24 bytes per document; `size` is the UTF-8 bytes of text, -1 for a blank document."""
IDS_REMEDY = "name the tokenizer they were made with: --tokenizer PATH/tokenizer.json"


@dataclass(frozen=True, slots=True)
class Document:
    """A text; `place` is its origin ("path" or "path:line"), for messages.

    A document that is already tokenized has `ids` (uint32 [n]) and an empty text.
    """

    text: str
    place: str
    ids: np.ndarray | None = None


class Fingerprint:
    """Computes the fingerprint of a document that is added in one piece or many.

    `lengths` (int64 [vocabulary]) gives the text bytes of each id; without it, ids are an error.
    `size` is the bytes so far.
    """

    def __init__(self, lengths: np.ndarray | None = None):
        self._lengths, self.size, self._blank = lengths, 0, True
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, piece: Document) -> None:
        """Raises DataError for ids without `lengths`, or beyond the vocabulary."""
        if piece.ids is None:
            data = piece.text.encode()
            self._hash.update(data)
            self.size += len(data)
            self._blank = self._blank and (not data or piece.text.isspace())
        elif len(piece.ids):
            if not self.size:  # another hash function: no text has the digest of token ids
                self._hash = hashlib.blake2b(digest_size=16, person=b"token ids")
            self._hash.update(piece.ids.astype("<u4").tobytes())
            self.size += int(id_lengths(piece, self._lengths).sum())
            self._blank = False

    def value(self) -> tuple[tuple[int, int], int]:
        """The fields of FINGERPRINT."""
        digest = self._hash.digest()
        low, high = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        return (low, high), -1 if self._blank else self.size


def no_text_field(where: str, field: str, columns: Iterable[str]) -> DataError:
    """The DataError of a row or a table without the field of its text."""
    return DataError(
        f"{where}: no field {shown(field)}; it has {names(columns)}; name one with --text-field"
    )


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a row. Raises DataError if the field is missing or no text."""
    if field not in row:
        raise no_text_field(where, field, row)
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {shown(field)} is a {type(text).__name__}, not a text; "
            "name another with --text-field"
        )
    return text


def id_lengths(document: Document, lengths: np.ndarray | None) -> np.ndarray:
    """int64 [ids]: the text bytes of each id of a document."""
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
