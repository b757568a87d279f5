"""SHA-256 of files, computed once while a file stays the same."""

import hashlib
import os
from pathlib import Path

_known: dict[tuple[int, int, int, int], str] = {}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; OSError where it cannot be read.

    Remembered in this process by device, inode, size and modification time. Safe to call from
    several threads: hashing releases the interpreter's lock.
    """
    with path.open("rb") as file:
        before = _identity(file.fileno())
        if before not in _known:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # A file that changed meanwhile has no hash to remember.
            if _identity(file.fileno()) != before:
                return digest
            _known[before] = digest
        return _known[before]


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
