"""A dataset being written: a folder claimed, shards filled and hashed, the manifest last.

While the partial manifest is there, what lies beside it is ours and unfinished.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from openpalm.data import manifest as manifest_file
from openpalm.data.manifest import FileEntry, Manifest, SplitEntry
from openpalm.errors import DataError, StorageError

PARTIAL = manifest_file.NAME + ".partial"
OUR_NAMES = re.compile(r"(train|val)-\d{5}\.(bin|idx)|tokenizer\.json|manifest\.json\.partial")


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[BinaryIO]:
    """The folder, ours alone while the mark in it is locked; what a failure leaves is removed."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / PARTIAL).open("ab") as partial:
            _lock(partial, out)
            _remove_ours(out, keep=PARTIAL)
            try:
                yield partial
            except BaseException:
                with contextlib.suppress(OSError):
                    _remove_ours(out)
                    if new:
                        out.rmdir()
                raise
    except OSError as error:
        raise StorageError(
            f"--out {error.filename or out}: cannot be written ({error.strerror}); "
            "free some space or choose another --out"
        ) from None


def _lock(partial: BinaryIO, out: Path) -> None:
    import fcntl

    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"--out {out}: another process is preparing it; wait for it") from None
    if (out / manifest_file.NAME).exists():
        raise DataError(f"--out {out}: another process has just prepared it; repeat the command")


def _remove_ours(out: Path, keep: str = "") -> None:
    for entry in list(out.iterdir()):
        if OUR_NAMES.fullmatch(entry.name) and entry.name != keep:
            entry.unlink()


def commit(out: Path, partial: BinaryIO, manifest: Manifest) -> None:
    """The one instant at which the dataset begins to exist."""
    partial.truncate(0)
    partial.write(manifest.to_json())
    _flush(partial)
    os.replace(out / PARTIAL, out / manifest_file.NAME)
    folder = os.open(out, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _HashedFile:
    """A file being written, hashed on the way."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("wb")
        self._sha256, self._size = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    def abandon(self) -> None:
        # On a full disk, closing fails once more; the error that counts is already on its way.
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> FileEntry:
        with self._file:
            _flush(self._file)
        return FileEntry(self._path.name, self._size, self._sha256.hexdigest())


class SplitWriter:
    """Appends documents to the shards of a split; each shard but the last is full.

    A context manager: files still open when it ends were not finished, and are only closed.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._open: tuple[_HashedFile, _HashedFile] | None = None
        self._room = 0
        self._files: list[FileEntry] = []
        self.tokens = self.documents = self.bytes = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open or ():
            file.abandon()

    def add(self, ids: Sequence[int], *, starts: bool) -> None:
        if starts:
            self._shard()[1].write(self.tokens.to_bytes(manifest_file.OFFSET_BYTES, "little"))
            self.documents += 1
        written = 0
        while written < len(ids):
            tokens_file = self._shard()[0]
            taken = ids[written : written + self._room]
            tokens_file.write(np.array(taken, dtype=self._dtype).tobytes())
            self._room -= len(taken)
            self.tokens += len(taken)
            written += len(taken)

    def close(self) -> SplitEntry:
        if self._open:
            self._files += [file.close() for file in self._open]
        self._open = None
        return SplitEntry(self.documents, self.tokens, self.bytes, tuple(self._files))

    def _shard(self) -> tuple[_HashedFile, _HashedFile]:
        if self._open is None or not self._room:
            self.close()
            names = manifest_file.shard_names(self._split, len(self._files) // 2)
            self._open = (
                _HashedFile(self._folder / names[0]),
                _HashedFile(self._folder / names[1]),
            )
            self._room = self._shard_tokens
        return self._open


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
