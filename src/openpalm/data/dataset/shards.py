"""Opens prepared datasets: token shards with an index of documents, memory-mapped.

DIR/tokenizer.json
DIR/{train,val}-00000.bin   token ids, little-endian uint16 (uint32 above 65536 ids)
DIR/{train,val}-00000.idx   uint64: start of each document in the split's tokens
DIR/manifest.json           written last: without it there is no dataset
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.blocks import (
    BlockArray,
    BlocksManifest,
    is_blocks,
    read_blocks_manifest,
)
from openpalm.data.dataset.manifest import Manifest
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError


def open_dataset(path: str | Path) -> "Dataset":
    """A prepared dataset, or blocks. Raises DataError where it is missing, torn or altered in size.

    The files of a split are compared with their hashes when it is first read.
    """
    path = Path(path)
    if is_blocks(path):
        return Dataset(path, read_blocks_manifest(path))
    return Dataset(path, manifest_file.read_manifest(path))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset on disk; its files are read on demand."""

    path: Path
    manifest: Manifest

    def tokenizer(self) -> Tokenizer:
        """Raises DataError where tokenizer.json is not the tokenizer of these tokens."""
        file = self.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.load(file)
        except DataError:
            raise DataError(f"{file}: is missing or damaged; {manifest_file.REMEDY}") from None
        if tokenizer.digest != self.manifest.tokenizer:
            raise DataError(
                f"{file}: is not the one the tokens were made with; " + manifest_file.REMEDY
            )
        return tokenizer

    def check(self, split: str) -> None:
        """Compares the hashes of a split's files. Raises DataError where one was altered.

        The ranks of one machine divide the files among them.
        """
        files = manifest_file.own_share(self.manifest.splits[split].files)
        manifest_file.check_hashes([(self.path, file) for file in files])

    def tokens(self, split: str) -> "TokenArray | BlockArray":
        """The split's tokens, read on demand. Raises DataError where a file was altered."""
        self.check(split)
        return self.array(split)

    def array(self, split: str) -> "TokenArray | BlockArray":
        """The split's tokens without a comparison of hashes: `check` has done it."""
        if isinstance(self.manifest, BlocksManifest):
            return BlockArray(self.path, self.manifest, split)
        files = self.manifest.splits[split].files[::2]
        paths = [self.path / file.name for file in files]
        return TokenArray(paths, self.manifest.dtype, self.manifest.vocab_size)

    def document_offsets(self, split: str) -> np.ndarray:
        """int64 [documents]: starts in the split's tokens. Raises DataError if altered."""
        self.check(split)
        entry = self.manifest.splits[split]
        if isinstance(self.manifest, BlocksManifest):
            tokens = BlockArray(self.path, self.manifest, split)
            return tokens.document_starts(0, len(tokens), self.tokenizer().end_of_text)
        data = b"".join((self.path / file.name).read_bytes() for file in entry.files[1::2])
        offsets = np.frombuffer(data, dtype="<u8")
        if (offsets[1:] < offsets[:-1]).any() or (offsets > entry.tokens).any():
            raise DataError(f"{self.path}: the index of {split} is torn; {manifest_file.REMEDY}")
        return offsets.astype(np.int64)


class TokenArray:
    """The tokens of all shards of a split as one array, memory-mapped; slices are NumPy arrays.

    A slice that holds an id beyond the vocabulary raises DataError: its file was altered.
    """

    def __init__(self, paths: Sequence[Path], dtype: str, vocab_size: int):
        self._folder, self._vocab_size = paths[0].parent, vocab_size
        self.dtype = np.dtype(dtype).newbyteorder("<")
        # As plain arrays: slices of NumPy's memmap class cost several times as much.
        maps = (np.memmap(path, dtype=self.dtype, mode="r") for path in paths)
        self._shards = [np.asarray(shard) for shard in maps]
        self._ends = list(accumulate(map(len, self._shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("tokens are sliced with step 1")
        found = [] if start < stop else [np.empty(0, dtype=self.dtype)]
        shard = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[shard] - len(self._shards[shard])
            found.append(self._shards[shard][start - begin : stop - begin])
            start += len(found[-1])
            shard += 1
        tokens = np.concatenate(found) if len(found) != 1 else found[0]
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise DataError(
                f"{self._folder}: holds token {tokens.max()} of a vocabulary of "
                f"{self._vocab_size}, so a shard was altered; {manifest_file.REMEDY}"
            )
        return tokens
