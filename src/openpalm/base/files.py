"""Durable files: atomic write and rename, fsync, locks; the SHA-256 of a file.

A file or folder is written under a temporary name, forced to disk and renamed. So after a kill or
a power failure its name holds either the old content or the new one, whole.
"""

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SETTLED_NS = 2 * 10**9
"""A file changed this recently is hashed again: a second change could have the same time stamp."""

LATE_S = 60.0
"""How long another machine may not yet see a new file of shared storage: NFS caches the entries of
a folder for up to a minute."""

_TRIES = 100
"""Times that a new folder is made again because another process removed it."""

_hashes: dict[tuple[int, ...], str] = {}
"""Hash of each file by its device, inode, size, modification time and change time."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` at the end of the block, or vanishes on an error.

    Makes the parent folder. Raises OSError.
    """
    partial = partial_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            yield file
            flush(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The rename itself is an entry of the folder, on disk only once the folder is.
    sync(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces the file; text is written as UTF-8. Raises OSError."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that replaces `path` at the end of the block, or vanishes on an error.

    Raises OSError.
    """
    old = partial_name(path).with_suffix(".old")
    with own_folder(path) as partial:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        # A folder that is not empty cannot be renamed over.
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """A new folder under the temporary name for `path`, removed at the end if it is still there.

    It is locked, so the next process knows that of a killed one, and removes it first: it may be as
    large as a model. Raises OSError.
    """
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had our number
    for other in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        _remove_abandoned(other)
    handle = _make_locked(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _make_locked(partial: Path) -> int:
    """Makes the folder and locks it; returns its descriptor, which holds the lock."""
    for _ in range(_TRIES):
        partial.mkdir(parents=True, exist_ok=True)
        # Until it is locked another process takes it for abandoned and removes it.
        with suppress(FileNotFoundError):
            handle = os.open(partial, os.O_RDONLY)
            if lock(handle) and os.fstat(handle).st_nlink:
                return handle
            os.close(handle)
        time.sleep(0.01)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(partial))


def _remove_abandoned(folder: Path) -> None:
    """Removes a folder that no process has locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # a file, or removed since
        return
    try:
        if lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def link_atomically(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, a name in its folder; replaces an older link.

    Raises OSError.
    """
    partial = partial_name(path)
    partial.unlink(missing_ok=True)  # of a killed process that had our number
    partial.symlink_to(target)
    partial.replace(path)
    sync(path.parent)


def partial_name(path: Path) -> Path:
    """The temporary name of this process for `path`, in the same folder."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def flush(file: BinaryIO) -> None:
    """Forces an open file's content to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Forces a closed file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised for, is of a full disk or an exceeded quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_until_seen(path: Path, condition: Callable[[], bool] | None = None) -> bool:
    """Waits until another machine's new file is there and `condition` holds; False if it is late.

    Without a condition it is that the file exists.
    """
    condition = condition or path.exists
    until = time.monotonic() + LATE_S
    while True:
        with suppress(OSError):
            if condition():
                return True
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes NFS ask the server again
        time.sleep(0.05)


def lock(descriptor: int) -> bool:
    """Locks an open file or folder until it is closed; False where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex, remembered until the file changes. Raises OSError."""
    with path.open("rb") as file:
        before = _state(file.fileno())
        if before in _hashes:
            return _hashes[before]
        found = hashlib.file_digest(file, "sha256").hexdigest()
        changed_ns = before[-1]
        if _state(file.fileno()) == before and time.time_ns() - changed_ns > SETTLED_NS:
            _hashes[before] = found
        return found


def _state(descriptor: int) -> tuple[int, ...]:
    """Includes the change time (ctime): a program cannot set it back."""
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
