"""Reads data sources as documents: text files, .jsonl rows, tables, token ids, built-in corpora.

Sources of many documents are read in blocks of whole documents, a source that is one document in
pieces. Where blocks and pieces are cut depends on the source alone, so that a second pass and
another process see the same ones. Executes nothing it reads; knows nothing about tokenizers.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from openpalm.base.console import shown
from openpalm.data.corpus.builtin import BUILTINS
from openpalm.data.corpus.document import Document, no_text_field
from openpalm.data.corpus.json_lines import (
    UnparsedLines,
    not_utf8,
    parse_lines,
    read_lines,
    refuse_binary,
)
from openpalm.data.corpus.line_streams import Tap, no_tap, readable, tap_file
from openpalm.data.corpus.sources import (
    BUILTIN_PREFIX,
    HUB_PREFIX,
    TEXT_FIELD,
    Source,
    find_sources,
)
from openpalm.errors import DataError, count_of

BLOCK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 30
BOM = "\ufeff"

DocumentBlock = UnparsedLines | list[Document]


def read_documents(inputs: Sequence[str], *, text_field: str = TEXT_FIELD) -> Iterator[Document]:
    """All documents of `inputs` in order, blank ones included.

    An input is a file (.jsonl, .ndjson, .json, also .gz and .zst: one document per line, in the
    field `text_field`; .parquet: one per row; any other: one text), a folder (recursively,
    sorted), a glob (sorted), `builtin:NAME` or `hub:NAME`. Raises DataError with file, line and
    remedy.
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
        return read_lines(cast(Path, source.path), tap, BLOCK_BYTES, source.text_field)
    if source.is_table:
        from openpalm.data.corpus.tables import parquet_documents

        # Parquet is read by columns, out of order: the raw bytes need a pass of their own.
        tap_file(cast(Path, source.path), tap)
        return _group(parquet_documents(cast(Path, source.path), source.text_field))
    if source.given.startswith(HUB_PREFIX):
        from openpalm.data.corpus.tables import hub_documents

        name = source.given.removeprefix(HUB_PREFIX)
        return _group(_tap_documents(hub_documents(name, source.text_field), tap))
    builtin = BUILTINS[source.given.removeprefix(BUILTIN_PREFIX)]
    return _group(_tap_documents(builtin(), tap))


def documents(block: DocumentBlock) -> Iterator[Document]:
    """The documents of a block, parsed and validated."""
    if isinstance(block, UnparsedLines):
        for where, row in parse_lines(block):
            yield Document(_text_of(row, block.text_field, where), where)
    else:
        yield from block


def read_pieces(source: Source, tap: Tap = no_tap) -> Iterator[Document]:
    """A source of one document, in pieces of about BLOCK_BYTES; no character is cut."""
    return (_id_pieces if source.is_ids else _text_pieces)(source, cast(Path, source.path), tap)


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
        if size > MAX_TEXT_BYTES:
            raise DataError(
                f"{path}: {size} bytes in one text, the limit is {MAX_TEXT_BYTES}; "
                "split it, or write a document a line as .jsonl"
            )
        if source.named and not size:
            raise DataError(f"{path}: is empty; give a file with text in it")
        with path.open("rb") as file:
            # The file may grow while it is read, beyond the size that was checked.
            while offset <= MAX_TEXT_BYTES:
                data = file.read(BLOCK_BYTES)
                tap(data)
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


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise no_text_field(where, field, row)
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {shown(field)} is a {type(text).__name__}, not a text; "
            "name another with --text-field"
        )
    return text
