"""Reads .jsonl files, compressed or not: blocks of unparsed lines, and rows (JSON objects).

A block is raw bytes, so that another process can parse it. Every limit is checked before JSON is
parsed: a hostile line cannot take more than a fixed multiple of MAX_LINE_BYTES of memory.
"""

import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.base.console import shown
from openpalm.data.corpus.cleaning import UNCHANGED, Cleaning
from openpalm.data.corpus.line_streams import Tap, no_tap, open_lines
from openpalm.data.corpus.sources import TEXT_FIELD
from openpalm.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
# Memory amplification: a parsed value takes some hundred bytes, but only three bytes of a line in
# [{},{},{}...]. A line of 64 MiB could take 2 GB.
MAX_LINE_VALUES = 1 << 20
BOM = b"\xef\xbb\xbf"
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class UnparsedLines(NamedTuple):
    """Whole lines of a .jsonl file; `first` is the number of the first line."""

    path: Path
    first: int
    data: bytes
    text_field: str = TEXT_FIELD
    cleaning: Cleaning = UNCHANGED


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", row) for each line of a .jsonl file, compressed or not; skips blank lines."""
    for lines in read_lines(path, no_tap, BLOCK_BYTES):
        yield from parse_lines(lines)


def read_lines(
    path: Path,
    tap: Tap,
    size: int,
    text_field: str = TEXT_FIELD,
    cleaning: Cleaning = UNCHANGED,
) -> Iterator[UnparsedLines]:
    """The lines of a file in blocks of about `size` bytes, which depend on the file alone."""
    with open_lines(path, tap) as stream:
        for lines in blocks_of_lines(stream, path, size):
            yield lines._replace(text_field=text_field, cleaning=cleaning)


def blocks_of_lines(stream: BufferedIOBase, path: Path, size: int) -> Iterator[UnparsedLines]:
    """The lines of an open file or member of an archive; `path` is its name for messages."""
    first = 1
    while data := stream.read(size):
        if not data.endswith(b"\n"):
            data += stream.readline(MAX_LINE_BYTES + 1)
        count = data.count(b"\n")
        # Only the last line can be too long: all others are within `size` bytes.
        if len(data) - 1 - data.rfind(b"\n", 0, -1) > MAX_LINE_BYTES:
            number = first + count - data.endswith(b"\n")
            raise DataError(
                f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes; split this document"
            )
        yield UnparsedLines(path, first, data)
        first += count


def parse_lines(lines: UnparsedLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", row) for each line that is not blank. Raises DataError with line and remedy."""
    for number, line in enumerate(lines.data.split(b"\n"), start=lines.first):
        if number == 1:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            where = f"{lines.path}:{number}"
            refuse_binary(line, where)
            yield where, parse_row(line, where)


def refuse_binary(data: bytes, where: str, offset: int = 0) -> None:
    """Raises DataError for a NUL byte, which UTF-8 text never has in practice."""
    position = data.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{where}: NUL byte at offset {offset + position}, so this is binary, not text; "
            "leave it out, or convert it to UTF-8 if it is UTF-16"
        )


def not_utf8(error: UnicodeDecodeError, where: str, offset: int = 0) -> DataError:
    """The DataError of bytes that are not UTF-8; `offset` is the file offset of those bytes."""
    byte = error.object[error.start]
    return DataError(
        f"{where}: not valid UTF-8, byte 0x{byte:02x} at offset {offset + error.start}; "
        "convert it, e.g. with iconv -f latin1 -t utf-8"
    )


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line. Raises DataError that begins with `where`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, where) from None
    if len(line) > MAX_LINE_VALUES and _has_many_values(line):
        raise DataError(
            f"{where}: a line of {len(line):,} bytes with more than {MAX_LINE_VALUES:,} values in "
            "it; leave out the fields that are not text, or split it"
        )
    try:
        row = json.loads(text)
        surrogate = _find_surrogate(text, row)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; leave this line out") from None
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}) near {shown(text[:40])}; each line must be one object"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a JSON {type(row).__name__}, not an object; each line must be one object"
        )
    if surrogate:
        raise DataError(
            f"{where}: holds {surrogate}, half a surrogate pair, which is not text; correct this "
            "line"
        )
    return row


def _has_many_values(line: bytes) -> bool:
    """Whether a line holds more than MAX_LINE_VALUES JSON values, without parsing it.

    Each value is a string, or has a comma or an opening bracket before it. Those marks count only
    outside strings: a long text with many commas is one value.
    """
    count = end = 0
    for found in _STRING.finditer(line):
        count += 1 + _count_marks(line, end, found.start())
        end = found.end()
        if count > MAX_LINE_VALUES:
            return True
    return count + _count_marks(line, end, len(line)) > MAX_LINE_VALUES


def _count_marks(line: bytes, start: int, end: int) -> int:
    return sum(line.count(mark, start, end) for mark in (b",", b"[", b"{"))


def _find_surrogate(line: str, row: object) -> str | None:
    """The first half of a surrogate pair in a row: JSON can spell one (\\ud800), UTF-8 cannot."""
    if "\\u" not in line:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
