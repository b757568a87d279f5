"""SHA-256 of files, cached for the life of the process while a file does not change."""

import hashlib
import os
import time
from pathlib import Path

SETTLED_NS = 2 * 10**9
"""A file changed this recently is hashed again: a second change could have the same time stamp."""

_known: dict[tuple[int, ...], str] = {}
"""Hash of each file by its device, inode, size, modification time and change time."""


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex, remembered until the file changes. Raises OSError."""
    with path.open("rb") as file:
        before = _state(file.fileno())
        if before in _known:
            return _known[before]
        found = hashlib.file_digest(file, "sha256").hexdigest()
        changed_ns = before[-1]
        if _state(file.fileno()) == before and time.time_ns() - changed_ns > SETTLED_NS:
            _known[before] = found
        return found


def _state(descriptor: int) -> tuple[int, ...]:
    """Includes the change time (ctime): a program cannot set it back."""
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
