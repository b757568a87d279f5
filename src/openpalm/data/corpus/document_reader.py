"""Sources as documents, one after the other: blocks of whole documents, or one in pieces.

Owns what counts as readable text, and the message for everything that does not. Bounds whatever
it reads, executes none of it, and knows nothing about tokens. Blocks are raw, so that they can be
parsed elsewhere: where they begin and end depends on the source alone.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from openpalm.base.console import names, shown
from openpalm.data.corpus.builtin import BUILTINS
from openpalm.data.corpus.document import Document
from openpalm.data.corpus.line_streams import Tap, no_tap, open_lines, readable, tap_file
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
MAX_LINE_BYTES = 64 << 20
# A value of a line takes some hundred bytes of memory, and three in the file: {},{},...
MAX_LINE_VALUES = 1 << 20
BOM = "\ufeff"
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class Lines(NamedTuple):
    """Whole lines of a .jsonl file, not yet parsed; `first` is the number of the first."""

    path: Path
    first: int
    data: bytes
    text_field: str = TEXT_FIELD


DocumentBlock = Lines | list[Document]


def read_documents(inputs: Sequence[str], *, text_field: str = TEXT_FIELD) -> Iterator[Document]:
    """All documents of `inputs` in order, blank ones included.

    An input is a file (.jsonl, .ndjson, .json, also .gz and .zst: a document a line, under
    `text_field`; .parquet: a document a row; any other: one text), a folder (recursively, sorted),
    a glob (sorted), `builtin:NAME` or `hub:NAME`.
    Raises DataError with file, line and remedy for what
    cannot be read.
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
    """The documents of a source in blocks of some BLOCK_BYTES; not for those that are one.

    `tap` is handed every raw byte of the source, in order.
    """
    if source.is_rows:
        blocks: Iterator[DocumentBlock] = _line_blocks(
            cast(Path, source.path), tap, source.text_field
        )
    elif source.is_table:
        from openpalm.data.corpus.tables import parquet_documents

        tap_file(cast(Path, source.path), tap)
        blocks = _grouped(parquet_documents(cast(Path, source.path), source.text_field))
    elif source.given.startswith(HUB_PREFIX):
        from openpalm.data.corpus.tables import hub_documents

        name = source.given.removeprefix(HUB_PREFIX)
        blocks = _grouped(_tapped(hub_documents(name, source.text_field), tap))
    else:
        builtin = BUILTINS[source.given.removeprefix(BUILTIN_PREFIX)]
        blocks = _grouped(_tapped(builtin(), tap))
    return blocks


def refuse_empty(source: Source, count: int) -> None:
    """Raises DataError where a file that was named has no document."""
    if source.named and not count:
        raise DataError(f"{source.given}: is empty; give a file with at least one document")


def documents(block: DocumentBlock) -> Iterator[Document]:
    """The documents of a block, parsed and validated."""
    if not isinstance(block, Lines):
        yield from block
        return
    for where, row in _rows(block):
        yield Document(_text_of(row, block.text_field, where), where)


def read_pieces(source: Source, tap: Tap = no_tap) -> Iterator[Document]:
    """A source that is one document, in pieces of some BLOCK_BYTES; characters stay whole."""
    return (_id_pieces if source.is_ids else _text_pieces)(source, cast(Path, source.path), tap)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", object) for each line of a .jsonl file, compressed or not; empty skipped."""
    for block in _line_blocks(path, no_tap):
        yield from _rows(block)


def _tapped(found: Iterable[Document], tap: Tap) -> Iterator[Document]:
    for document in found:
        # The NUL keeps "ab", "c" and "a", "bc" apart in whatever hashes these bytes.
        ids = document.ids
        tap(document.text.encode() + b"\0" if ids is None else ids.astype("<u4").tobytes())
        yield document


def _grouped(found: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
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
            while offset <= MAX_TEXT_BYTES:
                data = file.read(BLOCK_BYTES)
                tap(data)
                _refuse_binary(data, source.name, offset)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise _no_text(error, source.name, offset - held) from None
                if not data:
                    return
                yield Document(text if offset else text.removeprefix(BOM), source.name)
                offset += len(data)


def _id_pieces(source: Source, path: Path, tap: Tap) -> Iterator[Document]:
    """The ids of a nanoGPT .bin, little-endian uint16 and nothing else."""
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        if not size or size % 2:
            raise DataError(
                f"{path}: not uint16 token ids ({count_of(size, 'byte')}); write the file again"
            )
        while data := file.read(BLOCK_BYTES):
            tap(data)
            yield Document("", source.name, np.frombuffer(data, dtype="<u2").astype(np.uint32))


def _line_blocks(path: Path, tap: Tap, text_field: str = TEXT_FIELD) -> Iterator[Lines]:
    first = 1
    with open_lines(path, tap) as stream:
        while data := stream.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += stream.readline(MAX_LINE_BYTES + 1)
            count = data.count(b"\n")
            # Only the last line can be too long, for it alone reaches behind the block.
            if len(data) - 1 - data.rfind(b"\n", 0, -1) > MAX_LINE_BYTES:
                ended = data.endswith(b"\n")
                raise DataError(
                    f"{path}:{first + count - ended}: a line of more than {MAX_LINE_BYTES} bytes; "
                    "split this document"
                )
            yield Lines(path, first, data, text_field)
            first += count


def _rows(block: Lines) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            where = f"{block.path}:{number}"
            _refuse_binary(line, where)
            yield where, _parse_row(line, where)


def _refuse_binary(data: bytes, where: str, offset: int = 0) -> None:
    position = data.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{where}: NUL byte at offset {offset + position}, so this is binary, not text; "
            "leave it out, or convert it to UTF-8 if it is UTF-16"
        )


def _no_text(error: UnicodeDecodeError, where: str, offset: int) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{where}: not valid UTF-8, byte 0x{byte:02x} at offset {offset + error.start}; "
        "convert it, e.g. with iconv -f latin1 -t utf-8"
    )


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: no field {shown(field)}; it has {names(row)}; name one with --text-field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {shown(field)} is a {type(text).__name__}, not a text; "
            "name another with --text-field"
        )
    return text


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _no_text(error, where, 0) from None
    if len(line) > MAX_LINE_VALUES and _has_many_values(line):
        raise DataError(
            f"{where}: a line of {len(line):,} bytes with more than {MAX_LINE_VALUES:,} values in "
            "it; leave out the fields that are not text, or split it"
        )
    try:
        row = json.loads(text)
        half = _half_pair(text, row)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; leave this line out") from None
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}) near {shown(text[:40])}; each line must be one object"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: a JSON {type(row).__name__}, not an object; write {{"text": ...}} a line'
        )
    if half:
        raise DataError(
            f"{where}: holds {half}, half a surrogate pair, which is no text; mend the line"
        )
    return row


def _has_many_values(line: bytes) -> bool:
    """Whether a line of JSON holds more than MAX_LINE_VALUES values, without building any."""
    count = end = 0
    for found in _STRING.finditer(line):
        count += 1 + _marks(line, end, found.start())
        end = found.end()
        if count > MAX_LINE_VALUES:
            return True
    return count + _marks(line, end, len(line)) > MAX_LINE_VALUES


def _marks(line: bytes, start: int, end: int) -> int:
    """What separates or opens values between two texts."""
    return sum(line.count(mark, start, end) for mark in (b",", b"[", b"{"))


def _half_pair(line: str, row: object) -> str | None:
    """JSON can spell half a character (\\ud800), which is no text and breaks every encoder."""
    if "\\u" not in line:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
