"""Reads .tar files, compressed or not, as documents: one per member, or per line of a .jsonl.

Members are read in order from the stream; nothing is written to the disk, and memory does not grow
with the number of members.
"""

import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from openpalm.data.corpus.document import Document, text_of
from openpalm.data.corpus.json_lines import (
    MAX_LINE_BYTES,
    blocks_of_lines,
    not_utf8,
    parse_lines,
    refuse_binary,
)
from openpalm.data.corpus.line_streams import PACKED, no_tap, open_lines
from openpalm.data.corpus.tar_members import HEADER_BYTES, Header, Member, skip, tar_members
from openpalm.errors import DataError

LINE_BLOCK_BYTES = 1 << 20
_NESTED = (".tar", ".zip", ".parquet", ".bin", ".tfrecords", *PACKED)
_ROWS = (".jsonl", ".ndjson", ".json")


def archive_documents(path: Path, text_field: str) -> Iterator[Document]:
    """The documents of an archive, in order. Raises DataError for a damaged or unsafe one."""
    with open_lines(path, no_tap) as stream:
        for header in tar_members(stream, path):
            member = Member(stream, header.size, path)
            place = Path(f"{path}:{header.name}")
            if _is_hidden(header.name):
                pass
            elif header.name.lower().endswith(_ROWS):
                yield from _rows(member, place, text_field)
            else:
                yield _text(member, header, place)
            skip(stream, member.left + -header.size % HEADER_BYTES, path)


def _rows(member: Member, place: Path, text_field: str) -> Iterator[Document]:
    lines = blocks_of_lines(io.BufferedReader(member), place, LINE_BLOCK_BYTES)
    for block in lines:
        for where, row in parse_lines(block):
            yield Document(text_of(row, text_field, where), where)


def _text(member: Member, header: Header, place: Path) -> Document:
    if header.name.lower().endswith(_NESTED):
        raise DataError(f"{place}: a packed file or table inside an archive; unpack the archive")
    if header.size > MAX_LINE_BYTES:
        raise DataError(f"{place}: a text of more than {MAX_LINE_BYTES} bytes; split this document")
    data = io.BufferedReader(member).read()
    refuse_binary(data, str(place))
    try:
        return Document(data.decode("utf-8-sig"), str(place))
    except UnicodeDecodeError as error:
        raise not_utf8(error, str(place)) from None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
