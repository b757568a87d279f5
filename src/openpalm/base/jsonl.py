"""JSON-lines files that survive a kill: append, read, rewrite; a torn last line is cut off.

`open_jsonl` is for files that a user names (judgements, answers): locked, anything else refused.
`append_row` and `read_rows` are for our own logs: a torn metrics line is skipped.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from openpalm.base.files import atomic_file, flush, lock
from openpalm.errors import DataError, SettingsError, StorageError

MAX_BYTES = 1 << 31


class JsonlWriter:
    """Appends rows to an open file; `found` holds the rows that it had before.

    end: where the last whole row ends; the first row appended overwrites a torn line behind it.
    """

    def __init__(self, file: BinaryIO, path: Path, found: list[dict[str, Any]], end: int):
        self._file, self._path, self._end = file, path, end
        self.found = found

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row without buffering. Raises StorageError where the system refuses it."""
        line = _line(row)
        try:
            self._file.truncate(self._end)
            self._end += len(line)
            while line:  # an unbuffered write may take only some of the bytes
                line = line[self._file.write(line) :]
        except OSError as error:
            raise StorageError(
                f"--out {self._path}: cannot be written ({error.strerror}); the rows so far are "
                "kept: free some space and run the command again"
            ) from None


@contextmanager
def open_jsonl(path: Path) -> Iterator[JsonlWriter]:
    """Opens or creates the file for appending, locked against other processes.

    Raises SettingsError where it cannot be opened, DataError where it holds anything but rows.
    """
    if path.suffix != ".jsonl":
        raise SettingsError(f"--out {path}: must be a .jsonl")
    if path.exists() and not path.is_file():
        raise SettingsError(f"--out {path}: is no file; choose another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise SettingsError(
            f"--out {path}: cannot be written ({error.strerror}); choose another place"
        ) from None
    with file:
        if not lock(file.fileno()):
            raise SettingsError(f"--out {path}: another process is writing it")
        if file.seek(0, os.SEEK_END) > MAX_BYTES:
            raise DataError(f"--out {path}: larger than {MAX_BYTES} bytes; choose a new file")
        file.seek(0)
        content = file.read()
        # A kill tears at most the last line, and a torn row still begins as an object does.
        end = content.rfind(b"\n") + 1
        if content[end : end + 1] not in (b"", b"{"):
            raise DataError(f"--out {path}: is no file of rows; choose a new file")
        rows = [_row(line, f"{path}:{i}") for i, line in enumerate(content[:end].splitlines(), 1)]
        yield JsonlWriter(file, path, rows, end)
        flush(file)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one row to a log of ours, not yet forced to disk. Raises OSError."""
    with path.open("ab") as file:
        file.write(_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of ours; lines that are no whole row, torn by a kill, are skipped."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Replaces the file, atomically; returns the number of rows. Raises StorageError."""
    count = 0
    try:
        with atomic_file(path) as file:
            for row in rows:
                file.write(_line(row))
                count += 1
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    return count


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"--out {where}: is no row of JSON; choose a new file")
    return row
