"""Writes the token shards of a split: in order, hashed while written, resumable."""

import contextlib
import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from openpalm.base.files import flush
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import FileEntry, SplitEntry
from openpalm.errors import DataError


class _HashedFile:
    """A file hashed while it is written; `sha256` covers the first `size` bytes, which it has."""

    def __init__(self, path: Path, size: int = 0, sha256: "hashlib._Hash | None" = None):
        self.path, self.size = path, size
        self._sha256 = sha256 or hashlib.sha256()
        self.file: BinaryIO = path.open("r+b" if size else "wb")
        self.file.truncate(size)
        self.file.seek(size)

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def entry(self) -> FileEntry:
        return FileEntry(self.path.name, self.size, self._sha256.hexdigest())

    def close(self) -> FileEntry:
        with self.file:
            flush(self.file)
        return self.entry()


def _reopened(folder: Path, entry: FileEntry) -> _HashedFile:
    """The file cut to its entry, ready for more bytes: a kill may have left some behind it."""
    path, sha256, left = folder / entry.name, hashlib.sha256(), entry.size
    with path.open("rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            sha256.update(data)
            left -= len(data)
    if sha256.hexdigest() != entry.sha256:
        raise DataError(f"{path}: is torn or was altered; {manifest_file.REMEDY}")
    return _HashedFile(path, entry.size, sha256)


class SplitWriter:
    """Appends tokens to the shards of a split; every shard but the last is full.

    `done` is the entry of an earlier writer of the same files, to continue from. A context
    manager: files still open at its end are unfinished, and are only closed.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        shard_tokens: int,
        done: SplitEntry | None = None,
    ):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        done = done or SplitEntry(0, 0, 0, ())
        self.documents, self.tokens = done.documents, done.tokens
        self.bytes, self.lost, self.dropped = done.bytes, done.lost, done.dropped
        self._files = list(done.files)
        self._open: tuple[_HashedFile, _HashedFile] | None = None
        for entry in self._files[:-2]:
            manifest_file.check_size(folder / entry.name, entry.size)
        # The last shard may still grow: its bytes are hashed again up to where the entry ends.
        if self._files:
            tokens, index = (_reopened(folder, entry) for entry in self._files[-2:])
            self._open, self._files = (tokens, index), self._files[:-2]

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open or ():
            # On a full disk closing fails too; the first error is already being raised.
            with contextlib.suppress(OSError):
                file.file.close()

    def extend(self, tokens: np.ndarray, starts: np.ndarray, size: int, lost: int) -> None:
        """Appends `tokens`; documents start at `starts` (int64, positions in `tokens`).

        size: bytes of text that they spell; lost: bytes that the vocabulary cannot spell.
        """
        data = tokens.astype(self.dtype, copy=False)
        written = 0
        while written < len(data):
            files = self._shard()
            room = self._shard_tokens - files[0].size // self.dtype.itemsize
            taken = data[written : written + room]
            # A document is indexed in the shard of its first token, by its place in the split.
            local = starts[(starts >= written) & (starts < written + len(taken))]
            files[0].write(taken.tobytes())
            files[1].write((local + self.tokens).astype("<u8").tobytes())
            written += len(taken)
        self.tokens += len(data)
        self.documents += len(starts)
        self.bytes += size
        self.lost += lost

    @property
    def files(self) -> list[BinaryIO]:
        return [file.file for file in self._open or ()]

    def entry(self) -> SplitEntry:
        """The content so far; the last two files may still grow."""
        entries = [*self._files, *(file.entry() for file in self._open or ())]
        counts = self.documents, self.tokens, self.bytes
        return SplitEntry(*counts, tuple(entries), self.lost, self.dropped)

    def close(self) -> SplitEntry:
        if self._open:
            self._files += [file.close() for file in self._open]
        self._open = None
        return self.entry()

    def _shard(self) -> tuple[_HashedFile, _HashedFile]:
        full = self._shard_tokens * self.dtype.itemsize
        if self._open is None or self._open[0].size == full:
            self.close()
            names = manifest_file.shard_names(self._split, len(self._files) // 2)
            self._open = (
                _HashedFile(self._folder / names[0]),
                _HashedFile(self._folder / names[1]),
            )
        return self._open
