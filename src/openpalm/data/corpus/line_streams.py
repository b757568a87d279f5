"""Streams of .gz, .zst, .xz and plain files, with errors as DataError and a tap on the raw bytes.

Decompression bombs are bounded: memory grows with the bytes that the reader asks for, plus one
small chunk.
"""

import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

from openpalm.errors import DataError, StorageError

Tap = Callable[[bytes], None]
"""Called with every raw byte of a file, in order, to hash a source while it is read."""

BUFFER_BYTES = 1 << 20
# Four bytes of zstd can encode 128 KiB (one repeated byte), so a chunk of 2 KiB decompresses to at
# most 64 MiB.
ZSTD_CHUNK_BYTES = 2048
MAX_ZSTD_WINDOW_BYTES = 128 << 20
XZ_CHUNK_BYTES = 1 << 20
# `xz -9` needs 65 MiB.
MAX_XZ_BYTES = 256 << 20
GZIP, ZSTANDARD, XZ = (".gz", ".tgz"), (".zst",), (".xz", ".txz")
PACKED = (*GZIP, *ZSTANDARD, *XZ)
"""suffixes of compressed files"""
_PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_USER_ERRORS = (errno.EACCES, errno.EPERM, *_PATH_ERRORS)
"""Errors of the path that the user gave; all others are failures of the storage."""


def no_tap(data: bytes) -> None:
    """The tap that ignores the bytes."""


class Unavailable(DataError):
    """A source that is missing or not readable now: unfinished work of earlier reads is kept."""


def unreadable(path: Path, error: OSError) -> DataError | StorageError:
    """The error to raise for an OSError while reading `path` or the file that it names."""
    name, reason = error.filename or path, error.strerror or error
    if isinstance(error, FileNotFoundError):
        return Unavailable(f"{name}: no such file or folder; check the path")
    if error.errno in _USER_ERRORS:
        return Unavailable(f"{name}: cannot be read ({reason})")
    return StorageError(f"{name}: cannot be read ({reason}); repeat the command when it can be")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an OSError into Unavailable, or into StorageError if the read itself fails."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def open_lines(path: Path, tap: Tap) -> Iterator[io.BufferedReader]:
    """The decompressed content of a file, by its suffix (see PACKED). Raises DataError."""
    kind = path.suffix.lower()
    with readable(path), path.open("rb", buffering=0) as raw:
        stream = _Tapped(raw, tap)
        if kind in ZSTANDARD:
            stream = _Zstandard(stream, path)
        elif kind in XZ:
            stream = _Xz(stream, path)
        elif kind in GZIP:
            stream = gzip.GzipFile(fileobj=io.BufferedReader(stream, BUFFER_BYTES))
        try:
            yield io.BufferedReader(cast(io.RawIOBase, stream), BUFFER_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: gzip data damaged ({error}); fetch the file again") from None


def tap_file(path: Path, tap: Tap) -> None:
    """Calls `tap` with a whole file, in pieces."""
    with readable(path), path.open("rb") as file:
        while data := file.read(BUFFER_BYTES):
            tap(data)


class _Tapped(io.RawIOBase):
    """A raw file that calls `tap` with every byte it reads."""

    def __init__(self, raw: io.RawIOBase | io.FileIO, tap: Tap):
        self._raw, self._tap = raw, tap

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._raw.readinto(buffer) or 0
        self._tap(bytes(buffer[:count]))
        return count


class _Zstandard(io.RawIOBase):
    """Decompresses the frames of a .zst file one after another; a cut frame is an error."""

    def __init__(self, raw: io.RawIOBase, path: Path):
        self._raw, self._path = io.BufferedReader(raw, BUFFER_BYTES), path
        self._zstandard = _zstandard(path)
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            data = self._left or self._raw.read(ZSTD_CHUNK_BYTES)
            if not data:
                if self._frame:
                    self._refuse("the last frame is not whole")
                return 0
            self._ready = memoryview(self._decompressed(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, data: bytes) -> bytes:
        if not self._frame:
            limit = MAX_ZSTD_WINDOW_BYTES
            decompressor = self._zstandard.ZstdDecompressor(max_window_size=limit)
            self._frame = decompressor.decompressobj()
        try:
            text = self._frame.decompress(data)
        except self._zstandard.ZstdError as error:
            self._refuse(str(error))
        self._left = b""
        # A file may hold several frames (zstd -c a b): the rest of the chunk starts the next one.
        if self._frame.eof:
            self._left, self._frame = self._frame.unused_data, None
        return text

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(
            f"{self._path}: zstd data damaged, or made with a window of more than "
            f"{MAX_ZSTD_WINDOW_BYTES} bytes ({reason}); fetch the file again"
        )


class _Xz(io.RawIOBase):
    """Decompresses the streams of an .xz file one after another; a cut stream is an error."""

    def __init__(self, raw: io.RawIOBase, path: Path):
        self._raw, self._path = io.BufferedReader(raw, BUFFER_BYTES), path
        self._stream: lzma.LZMADecompressor | None = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while True:
            # Asked for no input, the stream has output of earlier input left.
            needs = self._stream is None or self._stream.needs_input
            data = (self._left or self._raw.read(XZ_CHUNK_BYTES)) if needs else b""
            self._left = b""
            if needs and not data:
                if self._stream:
                    self._refuse("the last stream is not whole")
                return 0
            # Between streams there may be padding of zero bytes.
            if self._stream is None and not (data := data.lstrip(b"\0")):
                continue
            text = self._decompressed(data, len(buffer))
            if text:
                buffer[: len(text)] = text
                return len(text)

    def _decompressed(self, data: bytes, most: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_BYTES)
            text = self._stream.decompress(data, most)
        except lzma.LZMAError as error:
            self._refuse(str(error))
        if self._stream.eof:
            self._left, self._stream = self._stream.unused_data, None
        return text

    def _refuse(self, reason: str) -> NoReturn:
        raise DataError(
            f"{self._path}: xz data damaged, or made with a dictionary of more than "
            f"{MAX_XZ_BYTES} bytes ({reason}); fetch the file again"
        )


def _zstandard(path: Path) -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: needs zstandard; pip install 'openpalm[data]'") from None
    return zstandard
