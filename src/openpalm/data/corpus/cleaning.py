"""Changes of a document's text before it is hashed: split at a marker, repaired, detokenized.

The order is that of create_finetune_tfrecords of mesh-transformer-jax: split, ftfy, detokenizer.
Both changes are made line by line, so a long text is cleaned in pieces of whole lines.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from types import ModuleType
from typing import Literal

from openpalm.data.corpus.document import Document
from openpalm.data.text.wikitext import detokenize_wikitext
from openpalm.errors import DataError

MAX_CLEANED_BYTES = 64 << 20
"""of a line in a long text, and of a document between two markers"""

FixText = Literal["none", "ftfy"]
Detokenize = Literal["none", "wikitext"]


@dataclass(frozen=True, slots=True)
class Cleaning:
    """split_text: marker between documents; fix_text: ftfy; detokenize: wikitext."""

    split_text: str | None = None
    fix_text: FixText = "none"
    detokenize: Detokenize = "none"

    def __post_init__(self) -> None:
        if self.split_text == "":
            raise DataError("--split-text: is empty; give the text between documents")
        if self.fix_text not in ("none", "ftfy"):
            raise DataError(f"--fix-text {self.fix_text}: must be none or ftfy")
        if self.detokenize not in ("none", "wikitext"):
            raise DataError(f"--detokenize {self.detokenize}: must be none or wikitext")

    @property
    def changes_text(self) -> bool:
        return self.fix_text != "none" or self.detokenize != "none"

    @property
    def fixer(self) -> str:
        """The fixer with its version, which decides what the text becomes; "none" without one."""
        return self.fix_text if self.fix_text == "none" else f"ftfy {_ftfy_version()}"

    def documents(self, document: Document) -> Iterator[Document]:
        """The cleaned documents that a document of text becomes; token ids stay as they are."""
        if document.ids is not None or self == UNCHANGED:
            yield document
            return
        for text in self._split(document.text):
            cleaned = _Cleaner(self).clean(text) if self.changes_text else text
            yield replace(document, text=cleaned)

    def pieces(self, pieces: Iterable[Document]) -> Iterator[Document]:
        """The pieces of one long text, cleaned; they end at the ends of lines."""
        if not self.changes_text:
            yield from pieces
            return
        cleaner, place, waiting = _Cleaner(self), "", ""
        for piece in pieces:
            place = piece.place
            lines, newline, rest = piece.text.rpartition("\n")
            if newline:
                yield Document(cleaner.clean(waiting + lines + newline), place)
                waiting = ""
            waiting += rest
            _check_size(waiting, place, "a line")
        if waiting:
            yield Document(cleaner.clean(waiting), place)

    def split_pieces(self, pieces: Iterable[Document]) -> Iterator[Document]:
        """The documents of a long text: the text between its markers, not cleaned yet."""
        assert self.split_text is not None
        place, waiting, found = "", "", False
        for piece in pieces:
            place = piece.place
            *whole, waiting = (waiting + piece.text).split(self.split_text)
            for text in whole:
                found = True
                yield Document(text, place)
            _check_size(waiting, place, f"a text without {self.split_text}")
        if waiting or not found:
            yield Document(waiting, place)

    def _split(self, text: str) -> list[str]:
        if self.split_text is None:
            return [text]
        texts = text.split(self.split_text)
        # Behind the last marker nothing follows: that is no document.
        return texts[:-1] if len(texts) > 1 and not texts[-1] else texts


UNCHANGED = Cleaning()


class _Cleaner:
    """Cleans the lines of one document in order."""

    def __init__(self, cleaning: Cleaning):
        self._cleaning, self._has_markup = cleaning, False

    def clean(self, text: str) -> str:
        """The text cleaned. It must begin and end where a line does, or the document."""
        if self._cleaning.fix_text == "ftfy":
            text = self._fixed(text)
        return detokenize_wikitext(text) if self._cleaning.detokenize == "wikitext" else text

    def _fixed(self, text: str) -> str:
        ftfy = _ftfy()
        # ftfy leaves &lt; alone behind the first "<" of a text, so that it makes no markup: a
        # piece continues the pieces before it.
        unescape = False if self._has_markup else "auto"
        self._has_markup = self._has_markup or "<" in text
        return ftfy.fix_text(text, normalization="NFKC", unescape_html=unescape)


def _check_size(text: str, place: str, what: str) -> None:
    if len(text) > MAX_CLEANED_BYTES:
        raise DataError(
            f"{place}: {what} of more than {MAX_CLEANED_BYTES} characters; split this document"
        )


def _ftfy() -> ModuleType:
    try:
        import ftfy
    except ImportError:
        raise DataError("--fix-text ftfy: needs ftfy; pip install 'openpalm[data]'") from None
    return ftfy


def _ftfy_version() -> str:
    _ftfy()
    return metadata.version("ftfy")
