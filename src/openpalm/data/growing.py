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

from openpalm.data.corpus import read_rows
from openpalm.errors import DataError, SettingsError, StorageError


class GrowingRows:
    """Appends rows behind `found`, those that were there."""

    def __init__(self, file: BinaryIO, path: Path, found: list[dict[str, Any]]):
        self._file, self._path, self.found = file, path, found

    def append(self, row: dict[str, Any]) -> None:
        """Hands one row to the system at once. Raises StorageError where it is refused."""
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"--out {self._path}: cannot be written ({error.strerror}); the rows so far are "
                "kept: free some space and give the same command"
            ) from None


@contextmanager
def growing(path: Path) -> Iterator[GrowingRows]:
    """Opens, or makes, the file, for this process alone.

    Raises SettingsError where it cannot be had, DataError where it holds something else than rows.
    """
    if path.suffix != ".jsonl":
        raise SettingsError(f"--out {path}: must be a .jsonl")
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
        _cut_torn_end(file)
        try:
            found = [row for _, row in read_rows(path)]
        except DataError as error:
            raise DataError(f"--out {error}; choose a new file") from None
        yield GrowingRows(file, path, found)
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


def _cut_torn_end(file: BinaryIO) -> None:
    """Removes what follows the last line's end."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
