"""Reads data sources as documents: text files, .jsonl rows, tables, token ids, built-in corpora.

Sources of many documents are read in blocks of whole documents, a source that is one document in
pieces. Where blocks and pieces are cut depends on the source alone, so that a second pass and
another process see the same ones. Executes nothing it reads; knows nothing about tokenizers.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from openpalm.data.corpus.archives import archive_documents
from openpalm.data.corpus.builtin import BUILTINS
from openpalm.data.corpus.cleaning import UNCHANGED, Cleaning
from openpalm.data.corpus.document import Document, text_of
from openpalm.data.corpus.json_lines import (
    UnparsedLines,
    not_utf8,
    parse_lines,
    read_lines,
    refuse_binary,
)
from openpalm.data.corpus.line_streams import (
    PACKED,
    Tap,
    no_tap,
    open_lines,
    readable,
    tap_file,
)
from openpalm.data.corpus.sources import (
    BUILTIN_PREFIX,
    HUB_PREFIX,
    TEXT_FIELD,
    Source,
    find_sources,
)
from openpalm.data.corpus.tfrecords import tfrecord_documents
from openpalm.errors import DataError, count_of

BLOCK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 30
BOM = "\ufeff"


class UncleanedDocuments(NamedTuple):
    """Documents that are cleaned when they are used."""

    found: list[Document]
    cleaning: Cleaning


DocumentBlock = UnparsedLines | UncleanedDocuments | list[Document]


def read_documents(inputs: Sequence[str], *, text_field: str = TEXT_FIELD) -> Iterator[Document]:
    """All documents of `inputs` in order, blank ones included.

    An input is a file (.jsonl, .ndjson, .json, also packed: one document per line, in the field
    `text_field`; .parquet: one per row; .tar: one per member; .tfrecords: one per record; any
    other: one text), a folder (recursively, sorted), a glob (sorted), `builtin:NAME` or
    `hub:NAME`. Raises DataError with file, line and remedy.
    """
    for source in find_sources(inputs, text_field=text_field):
        if source.is_one:
            pieces = list(read_pieces(source))
            yield Document("".join(piece.text for piece in pieces), source.name)
        else:
            count = 0
            for block in read_document_blocks(source):
                for document in documents(block):
                    count += 1
                    yield document
            refuse_empty(source, count)


def read_document_blocks(source: Source, tap: Tap = no_tap) -> Iterator[DocumentBlock]:
    """The documents of a source in blocks of about BLOCK_BYTES; not for a source of one document.

    `tap` is called with every raw byte of the source, in order.
    """
    if source.is_rows:
        path, field = cast(Path, source.path), source.text_field
        return read_lines(path, tap, BLOCK_BYTES, field, source.cleaning)
    groups = _group(_found_documents(source, tap))
    if source.cleaning == UNCHANGED:
        return groups
    return (UncleanedDocuments(group, source.cleaning) for group in groups)


def _found_documents(source: Source, tap: Tap) -> Iterator[Document]:
    """The documents of a source that is not lines, one by one and not cleaned."""
    if source.path is None:
        return _tap_documents(_unfiled_documents(source), tap)
    if source.is_tfrecords:
        return tfrecord_documents(source.path, source.text_field, tap)
    if not (source.is_table or source.is_archive):
        return source.cleaning.split_pieces(_text_pieces(source, source.path, tap))
    # Parquet is read by columns, out of order, and an archive not to its end: the raw bytes need a
    # pass of their own.
    tap_file(source.path, tap)
    if source.is_archive:
        return archive_documents(source.path, source.text_field)
    from openpalm.data.corpus.tables import parquet_documents

    return parquet_documents(source.path, source.text_field)


def _unfiled_documents(source: Source) -> Iterable[Document]:
    """The documents of the Hub or of a built-in corpus."""
    if source.given.startswith(HUB_PREFIX):
        from openpalm.data.corpus.tables import hub_documents

        return hub_documents(source.given.removeprefix(HUB_PREFIX), source.text_field)
    return BUILTINS[source.given.removeprefix(BUILTIN_PREFIX)]()


def documents(block: DocumentBlock) -> Iterator[Document]:
    """The documents of a block, parsed, validated and cleaned."""
    if isinstance(block, UnparsedLines):
        for where, row in parse_lines(block):
            text = text_of(row, block.text_field, where)
            yield from block.cleaning.documents(Document(text, where))
    elif isinstance(block, UncleanedDocuments):
        for document in block.found:
            yield from block.cleaning.documents(document)
    else:
        yield from block


def read_pieces(source: Source, tap: Tap = no_tap) -> Iterator[Document]:
    """A source of one document, in pieces of about BLOCK_BYTES; no character is cut."""
    path = cast(Path, source.path)
    if source.is_ids:
        return _id_pieces(source, path, tap)
    return source.cleaning.pieces(_text_pieces(source, path, tap))


def refuse_empty(source: Source, count: int) -> None:
    """Raises DataError if a file that the user named has no document."""
    if source.named and not count:
        raise DataError(f"{source.given}: is empty; give a file with at least one document")


def _tap_documents(found: Iterable[Document], tap: Tap) -> Iterator[Document]:
    for document in found:
        # The NUL makes "ab", "c" and "a", "bc" different bytes, and so different hashes.
        ids = document.ids
        tap(document.text.encode() + b"\0" if ids is None else ids.astype("<u4").tobytes())
        yield document


def _group(found: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
        # 64 bytes for each: a group of a million empty documents must end, too.
        size += len(document.text) + 64 if document.ids is None else document.ids.nbytes
        if size >= BLOCK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _text_pieces(source: Source, path: Path, tap: Tap) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with readable(path):
        size = path.stat().st_size
    if path.suffix.lower() not in PACKED:
        _refuse_long_text(path, size)
    if source.named and not size:
        raise DataError(f"{path}: is empty; give a file with text in it")
    with open_lines(path, tap) as file:
        while True:
            data = file.read(BLOCK_BYTES)
            refuse_binary(data, source.name, offset)
            # The decoder holds back a character cut by the end of the last piece.
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(error, source.name, offset - held) from None
            if not data:
                return
            yield Document(text if offset else text.removeprefix(BOM), source.name)
            offset += len(data)
            # A packed file does not tell its size, and any file may grow while it is read.
            _refuse_long_text(path, offset)


def _refuse_long_text(path: Path, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise DataError(
            f"{path}: {size} bytes in one text, the limit is {MAX_TEXT_BYTES}; "
            "split it, or write a document a line as .jsonl"
        )


def _id_pieces(source: Source, path: Path, tap: Tap) -> Iterator[Document]:
    """The token ids of a nanoGPT .bin file: little-endian uint16 without a header."""
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        if not size or size % 2:
            raise DataError(
                f"{path}: not uint16 token ids ({count_of(size, 'byte')}); write the file again"
            )
        while data := file.read(BLOCK_BYTES):
            tap(data)
            yield Document("", source.name, np.frombuffer(data, dtype="<u2").astype(np.uint32))
