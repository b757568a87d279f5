"""Files, folders, globs and built-in corpora as documents, one after the other.

Owns what counts as readable text, and the message for everything that does not. Bounds whatever
it reads, executes none of it, and knows nothing about tokens.
"""

import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from openpalm.data.builtin import BUILTINS
from openpalm.data.document import Document
from openpalm.errors import DataError

FOLDER_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".jsonl.gz")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_TEXT_BYTES = 1 << 30
MAX_LINE_BYTES = 64 << 20
BUILTIN_PREFIX = "builtin:"

Tap = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One thing to read: a file, or a built-in corpus where `path` is None.

    `given` is the input as the user wrote it; `named` says that it was this very file, so that
    its being empty is a mistake and not a detail of a folder.
    """

    given: str
    path: Path | None
    named: bool


def read_documents(inputs: Sequence[str], *, text_field: str = "text") -> Iterator[Document]:
    """All documents of `inputs` in order, blank ones included.

    An input is a file (.jsonl and .jsonl.gz: a document a line, under `text_field`; any other: one
    text), a folder (recursively, sorted), a glob (sorted) or `builtin:NAME`. Raises DataError with
    file, line and remedy for what cannot be read.
    """
    for source in find_sources(inputs):
        yield from read_source(source, text_field=text_field)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Expands folders and globs, and checks that everything exists, without reading it."""
    if not inputs:
        raise DataError("no input; name a file, a folder, a glob or builtin:python-docs")
    return [source for given in inputs for source in _expand(given)]


def read_source(
    source: Source, *, text_field: str = "text", tap: Tap | None = None
) -> Iterator[Document]:
    """The documents of one source; `tap` is handed every raw byte that was read, in order."""
    tap = tap or (lambda data: None)
    if source.path is None:
        documents = _builtin(source.given, tap)
    elif is_rows(source.path):
        documents = _row_documents(source.path, text_field, tap)
    else:
        documents = iter([Document(_read_text(source, tap), str(source.path))])
    first = next(documents, None)
    if first is None:
        if source.named:
            raise DataError(f"{source.given}: is empty; give a file with at least one document")
        return
    yield from itertools.chain([first], documents)


def read_rows(path: Path, tap: Tap | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", object) for each line of a .jsonl or .jsonl.gz file; empty lines skipped."""
    for number, line in _lines(path, tap or (lambda data: None)):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield where, _parse_row(line, where)


def is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ROW_SUFFIXES)


def shown(value: object) -> str:
    """A value from outside as it may appear in a message: one short line, nothing unprintable."""
    text = value if isinstance(value, str) else type(value).__name__
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _expand(given: str) -> list[Source]:
    if given.startswith(BUILTIN_PREFIX):
        if given.removeprefix(BUILTIN_PREFIX) not in BUILTINS:
            known = ", ".join(BUILTIN_PREFIX + name for name in BUILTINS)
            raise DataError(f"{given}: no such built-in corpus; known: {known}")
        return [Source(given, None, True)]
    path = Path(given)
    with _readable(path):
        if path.is_dir():
            return [Source(given, file, False) for file in _folder(path)]
        if path.exists():
            return [Source(given, _regular(path), True)]
    if glob.has_magic(given):
        return [Source(given, file, False) for file in _glob(given)]
    raise DataError(f"{given}: no such file or folder; check the path")


def _folder(folder: Path) -> list[Path]:
    """The text files below a folder, sorted by path."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    walk = os.walk(folder, onerror=refuse)
    files = (Path(where, name) for where, _, names in walk for name in names)
    found = sorted(p for p in files if p.name.lower().endswith(FOLDER_SUFFIXES) and p.is_file())
    if not found:
        wanted = " ".join("*" + suffix for suffix in FOLDER_SUFFIXES)
        raise DataError(f"{folder}: holds no {wanted}; name other files or use a glob")
    return found


def _glob(pattern: str) -> list[Path]:
    found = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not found:
        raise DataError(f"{pattern}: matches no file; check the pattern (and quote it)")
    return found


def _regular(path: Path) -> Path:
    # A device or a pipe has no end, or never a beginning.
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file; save it as a file first")
    return path


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever the operating system says against reading becomes a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder; check the path") from None
    except OSError as error:
        name = error.filename or path
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def _builtin(given: str, tap: Tap) -> Iterator[Document]:
    for document in BUILTINS[given.removeprefix(BUILTIN_PREFIX)]():
        # The NUL keeps "ab", "c" and "a", "bc" apart in whatever hashes these bytes.
        tap(document.text.encode() + b"\0")
        yield document


def _read_text(source: Source, tap: Tap) -> str:
    path = cast(Path, source.path)
    with _readable(path):
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise DataError(
                f"{path}: {size} bytes in one text, the limit is {MAX_TEXT_BYTES}; "
                "split it, or write a document a line as .jsonl"
            )
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    tap(data)
    if source.named and not data:
        raise DataError(f"{path}: is empty; give a file with text in it")
    _refuse_binary(data, str(path))
    return _decode(data.removeprefix(b"\xef\xbb\xbf"), str(path), len(data))


def _refuse_binary(data: bytes, where: str) -> None:
    position = data.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{where}: NUL byte at offset {position}, so this is binary, not text; "
            "leave it out, or convert it to UTF-8 if it is UTF-16"
        )


def _decode(data: bytes, where: str, size: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # An offset in what the user has on disk: a stripped BOM counts.
        offset = error.start + size - len(data)
        raise DataError(
            f"{where}: not valid UTF-8, byte 0x{data[error.start]:02x} at offset {offset}; "
            "convert it, e.g. with iconv -f latin1 -t utf-8"
        ) from None


def _row_documents(path: Path, text_field: str, tap: Tap) -> Iterator[Document]:
    for where, row in read_rows(path, tap):
        yield Document(_text_of(row, text_field, where), where)


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: no field {shown(field)}; it has {_names(row)}; name one with --text-field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {shown(field)} is a {type(text).__name__}, not a text; "
            "name another with --text-field"
        )
    return text


def _names(row: Iterable[str]) -> str:
    names = [shown(name) for name in itertools.islice(row, 9)]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "no field at all"


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    text = _decode(line, where, len(line))
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


def _half_pair(line: str, row: object) -> str | None:
    """JSON can spell half a character (\\ud800), which is no text and breaks every encoder."""
    if "\\u" not in line:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])


def _lines(path: Path, tap: Tap) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _readable(path), path.open("rb", buffering=0) as raw:
        try:
            stream = _uncompressed(path, io.BufferedReader(_Tapped(raw, tap), 1 << 20))
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes; "
                        "split this document"
                    )
                _refuse_binary(line, f"{path}:{number}")
                yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: gzip data damaged after line {number} ({error}); fetch the file again"
            ) from None


def _uncompressed(path: Path, stream: io.BufferedReader) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    return stream


class _Tapped(io.RawIOBase):
    """A raw file that shows every byte it delivers to `tap`."""

    def __init__(self, raw: io.RawIOBase | io.FileIO, tap: Tap):
        self._raw, self._tap = raw, tap

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._raw.readinto(buffer) or 0
        self._tap(bytes(buffer[:count]))
        return count
