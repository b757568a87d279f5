"""A .jsonl that grows row by row and survives a kill: what is whole stays, a torn end is cut off.

One process at a time. Knows nothing of what the rows say.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from openpalm.errors import DataError, SettingsError, StorageError

MAX_BYTES = 1 << 31


class JsonlWriter:
    """Appends rows behind `found`, those that are there; a torn end goes when the first comes."""

    def __init__(self, file: BinaryIO, path: Path, found: list[dict[str, Any]], end: int):
        self._file, self._path, self._end = file, path, end
        self.found = found

    def append(self, row: dict[str, Any]) -> None:
        """Hands one row to the system at once. Raises StorageError where it is refused."""
        line = json.dumps(row).encode() + b"\n"
        try:
            self._file.truncate(self._end)
            self._end += len(line)
            while line:  # an unbuffered write may take a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise StorageError(
                f"--out {self._path}: cannot be written ({error.strerror}); the rows so far are "
                "kept: free some space and give the same command"
            ) from None


@contextmanager
def open_jsonl(path: Path) -> Iterator[JsonlWriter]:
    """Opens, or makes, the file, for this process alone.

    Raises SettingsError where it cannot be had, DataError where it holds something else than rows.
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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"--out {path}: another process is writing it") from None
        if file.seek(0, os.SEEK_END) > MAX_BYTES:
            raise DataError(f"--out {path}: larger than {MAX_BYTES} bytes; choose a new file")
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if content[end : end + 1] not in (b"", b"{"):
            raise DataError(f"--out {path}: is no file of rows; choose a new file")
        rows = [_row(line, f"{path}:{i}") for i, line in enumerate(content[:end].splitlines(), 1)]
        yield JsonlWriter(file, path, rows, end)
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes the file whole or not at all; how many rows it has."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                count += 1
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    return count


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"--out {where}: is no row of JSON; choose a new file")
    return row
