"""The members of a .tar stream, read by hand: headers, long names and pax attributes, all bounded.

Links, devices, sparse files and paths that leave the archive are refused; nothing is ever written.
"""

import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from openpalm.base.console import shown
from openpalm.errors import DataError

HEADER_BYTES = 512
# A member's name and attributes: paths have at most 4,096 bytes.
MAX_ATTRIBUTES_BYTES = 64 << 10
MAX_SKIPPED_BYTES = 1 << 30


class Header(NamedTuple):
    name: str
    kind: str
    size: int


class Member(io.RawIOBase):
    """The next `size` bytes of a stream."""

    def __init__(self, stream: io.BufferedIOBase, size: int, archive: Path):
        self._stream, self._archive, self.left = stream, archive, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._stream.read(min(len(buffer), self.left))
        if not data and self.left:
            _refuse(self._archive, "it ends inside a member")
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def is_archive(data: bytes) -> bool:
    """Whether the first bytes of a file are a header of a .tar."""
    return len(data) >= HEADER_BYTES and data[257:262] == b"ustar" and _sum_fits(data)


def tar_members(stream: io.BufferedIOBase, path: Path) -> Iterator[Header]:
    """The headers of regular files; the caller reads each member up to the next header."""
    long_name: str | None = None
    attributes: dict[str, str] = {}
    while (header := _next_header(stream, path)) is not None:
        name, kind, size = header
        if kind in ("L", "x", "g", "K"):
            data = _attributes(stream, header, path)
            if kind == "L":
                long_name = data.rstrip(b"\0").decode(errors="replace")
            elif kind == "x":
                attributes = _pax(data, path)
            continue
        name = attributes.get("path", long_name or name)
        if "size" in attributes:
            size = _number(attributes["size"], path)
        if any(key.startswith("GNU.sparse") for key in attributes):
            kind = "S"
        long_name, attributes = None, {}
        _refuse_unsafe(name, kind, path)
        if kind == "5":
            continue
        yield Header(name, kind, size)


def _next_header(stream: io.BufferedIOBase, path: Path) -> Header | None:
    """The next header; None at the end of the archive."""
    data = stream.read(HEADER_BYTES)
    if not data or data == bytes(HEADER_BYTES):
        _refuse_rest(stream, path)
        return None
    if len(data) < HEADER_BYTES or not _sum_fits(data):
        _refuse(path, "a header is wrong")
    name = _field(data[:100])
    prefix = _field(data[345:500]) if data[257:263] == b"ustar\0" else ""
    kind = chr(data[156]) if data[156] else "0"
    # Directories and links have no content, whatever size they name.
    size = 0 if kind in "123456" else _size(data[124:136], path)
    return Header(f"{prefix}/{name}" if prefix else name, kind, size)


def _refuse_rest(stream: io.BufferedIOBase, path: Path) -> None:
    """Behind the end there is only padding with zeros."""
    read = 0
    while data := stream.read(1 << 16):
        read += len(data)
        if data.strip(b"\0") or read > MAX_SKIPPED_BYTES:
            _refuse(path, "data follows its end")


def _refuse_unsafe(name: str, kind: str, path: Path) -> None:
    where = f"{path}: member {shown(name)}"
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not name.strip("/"):
        raise DataError(f"{where}: a path outside the archive; make the archive again")
    if kind not in "057":
        what = {"1": "a link", "2": "a link", "S": "a sparse file"}.get(kind, "no regular file")
        raise DataError(f"{where}: is {what}; make the archive of regular files")


def _attributes(stream: io.BufferedIOBase, header: Header, path: Path) -> bytes:
    if header.size > MAX_ATTRIBUTES_BYTES:
        _refuse(path, f"{header.size} bytes of attributes for one member")
    data = stream.read(header.size)
    if len(data) < header.size:
        _refuse(path, "it ends inside a member")
    skip(stream, -header.size % HEADER_BYTES, path)
    return data


def _pax(data: bytes, path: Path) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        record = data[len(length) + 1 : count]
        key, equals, value = record.partition(b"=")
        if not space or not equals or not record.endswith(b"\n") or count > len(data):
            _refuse(path, "attributes of a member are wrong")
        found[key.decode(errors="replace")] = value[:-1].decode(errors="replace")
        data = data[count:]
    return found


def _number(text: str, path: Path) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        _refuse(path, "a size is wrong")
    return int(text)


def _size(field: bytes, path: Path) -> int:
    """Octal digits, or from 8 GiB on a binary number behind the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if any(byte not in b"01234567" for byte in digits):
        _refuse(path, "a size is wrong")
    return int(digits or b"0", 8)


def _sum_fits(data: bytes) -> bool:
    """The header's checksum: the sum of its bytes, its own field taken as spaces."""
    digits = data[148:156].strip(b" \0")
    if not digits or any(byte not in b"01234567" for byte in digits):
        return False
    return int(digits, 8) == sum(data[:148]) + 8 * 0x20 + sum(data[156:])


def _field(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


def skip(stream: io.BufferedIOBase, count: int, path: Path) -> None:
    if count > MAX_SKIPPED_BYTES:
        _refuse(path, f"{count} bytes of a member that is not read")
    while count:
        data = stream.read(min(count, 1 << 20))
        if not data:
            _refuse(path, "it ends inside a member")
        count -= len(data)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: tar archive damaged ({reason}); fetch the file again")
