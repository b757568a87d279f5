"""The shards of a split: filled in order, hashed on the way, gone on with where they end."""

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
    """A file being written, hashed on the way; the first `size` bytes are there and in `sha256`."""

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


def _beginning(path: Path, entry: FileEntry) -> "hashlib._Hash":
    """The hash of a file's first bytes, those that `entry` tells of."""
    sha256, left = hashlib.sha256(), entry.size
    with path.open("rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            sha256.update(data)
            left -= len(data)
    if sha256.hexdigest() != entry.sha256:
        raise DataError(f"{path}: is torn or was altered; {manifest_file.REMEDY}")
    return sha256


class SplitWriter:
    """Appends to the shards of a split; each shard but the last is full.

    `done` is where an earlier writer of the same files came to. A context manager: files still
    open when it ends were not finished, and are only closed.
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
        self.bytes, self.lost = done.bytes, done.lost
        self._files = list(done.files)
        self._open: tuple[_HashedFile, _HashedFile] | None = None
        for entry in self._files[:-2]:
            manifest_file.check_size(folder / entry.name, entry.size)
        if self._files:
            last, self._files = self._files[-2:], self._files[:-2]
            known = [
                (folder / one.name, one.size, _beginning(folder / one.name, one)) for one in last
            ]
            self._open = (_HashedFile(*known[0]), _HashedFile(*known[1]))

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open or ():
            # On a full disk, closing fails once more; the error that counts is on its way.
            with contextlib.suppress(OSError):
                file.file.close()

    def extend(self, tokens: np.ndarray, starts: np.ndarray, size: int, lost: int) -> None:
        """`tokens` of `size` bytes of text; documents start at `starts` (int64, in `tokens`).

        `lost` counts the bytes of text beside them that the vocabulary cannot spell.
        """
        data = tokens.astype(self.dtype, copy=False)
        written = 0
        while written < len(data):
            files = self._shard()
            room = self._shard_tokens - files[0].size // self.dtype.itemsize
            taken = data[written : written + room]
            # A document starts in the shard that its first token is in.
            begun = starts[(starts >= written) & (starts < written + len(taken))]
            files[0].write(taken.tobytes())
            files[1].write((begun + self.tokens).astype("<u8").tobytes())
            written += len(taken)
        self.tokens += len(data)
        self.documents += len(starts)
        self.bytes += size
        self.lost += lost

    @property
    def files(self) -> list[BinaryIO]:
        return [file.file for file in self._open or ()]

    def entry(self) -> SplitEntry:
        """What was written so far; the last two files may still grow."""
        entries = [*self._files, *(file.entry() for file in self._open or ())]
        return SplitEntry(self.documents, self.tokens, self.bytes, tuple(entries), self.lost)

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
