"""Blocks of token ids in parquet files: their manifest, and the tokens read back at random.

DIR/tokenizer.json
DIR/{train,val}-00000.parquet   rows `input_ids`, list<int32>, all of one length
DIR/manifest.json               written last: without it there are no blocks

Joined in order, the rows of a split are its tokens. A row group is the unit of reading, so that
training reads windows anywhere in the files and memory stays small.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpalm.data.corpus.line_streams import unreadable
from openpalm.data.corpus.tables import IDS_COLUMN, arrow
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import REMEDY, SPLITS, Manifest, SplitEntry
from openpalm.errors import DataError, one_line

FORMAT = "openpalm-blocks"
TEXT_ORDER = "text"
SHUFFLED = "shuffled:"
MAX_BLOCK_TOKENS = 1 << 24
# A group is decoded to read one window of it: small, but a file has few of them.
GROUP_TOKENS = 1 << 18
FILE_GROUPS = 64
CACHED_GROUPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksManifest(Manifest):
    """The manifest of a folder of blocks: that of the tokens, and how they are cut into rows.

    order: "text", or "shuffled:SEED"; rest: tokens at the end of each split that fill no block and
    were dropped; group_blocks, file_blocks: rows of each row group and file but the last.
    """

    sequence_length: int
    order: str
    group_blocks: int
    file_blocks: int
    rest: dict[str, int]

    @property
    def is_shuffled(self) -> bool:
        return self.order.startswith(SHUFFLED)


def sizes(sequence_length: int) -> tuple[int, int]:
    """Blocks in a row group, and in a file."""
    group = max(1, GROUP_TOKENS // sequence_length)
    return group, group * FILE_GROUPS


def block_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def is_blocks(folder: Path) -> bool:
    """Whether a folder's manifest is one of blocks; False also where there is none."""
    return manifest_file.format_of(folder) == FORMAT


def read_blocks_manifest(folder: Path) -> BlocksManifest:
    """The manifest of a folder of blocks; checks that every file exists with its size.

    Raises DataError where it is missing, torn or altered.
    """
    path = folder / manifest_file.NAME
    content = manifest_file.read_content(path, FORMAT)
    manifest = manifest_file.parse(content, path, BlocksManifest)
    if not 0 < manifest.sequence_length <= MAX_BLOCK_TOKENS:
        raise DataError(f"{path}: sequence_length is out of range; {REMEDY}")
    group, file = manifest.group_blocks, manifest.file_blocks
    limit = max(1, 4 * GROUP_TOKENS // manifest.sequence_length)
    if not 0 < group <= limit or not file or file % group or set(manifest.rest) != set(SPLITS):
        raise DataError(f"{path}: the sizes of groups or files are out of range; {REMEDY}")
    for split, entry in manifest.splits.items():
        count = -(-_rows(entry.tokens, manifest) // file)
        if [one.name for one in entry.files] != [block_file(split, i) for i in range(count)]:
            raise DataError(f"{path}: the files of {split} contradict its counts; {REMEDY}")
        for one in entry.files:
            manifest_file.check_size(folder / one.name, one.size)
    return manifest


def _rows(tokens: int, manifest: BlocksManifest) -> int:
    return -(-tokens // manifest.sequence_length)


class BlockArray:
    """The tokens of a split of blocks as one array; slices are NumPy arrays, read on demand.

    Raises DataError for a file that is damaged or disagrees with the manifest.
    """

    def __init__(self, folder: Path, manifest: BlocksManifest, split: str):
        self._folder, self._manifest, self._split = folder, manifest, split
        self._entry: SplitEntry = manifest.splits[split]
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._group_tokens = manifest.group_blocks * manifest.sequence_length
        # Evaluation reads windows in order, training at random: few groups serve both.
        self._group = functools.lru_cache(CACHED_GROUPS)(self._read_group)
        arrow(folder)

    def __len__(self) -> int:
        return self._entry.tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("tokens are sliced with step 1")
        size, found = self._group_tokens, []
        while start < stop:
            group = start // size
            found.append(self._group(group)[start - group * size : stop - group * size])
            start += len(found[-1])
        return np.concatenate(found) if found else np.empty(0, dtype=self.dtype)

    def document_starts(self, start: int, stop: int, end_of_text: int | None) -> np.ndarray:
        """int64: the positions in start..stop where a document starts, from the end markers.

        In shuffled blocks a document also starts at each block: its neighbour is another's text.
        """
        length = self._manifest.sequence_length
        # The token before `start` decides whether a document starts there.
        before = max(0, start - 1)
        starts = np.flatnonzero(self[before:stop] == end_of_text) + before + 1
        extra = np.arange(-(-start // length) * length, stop, length)
        extra = extra if self._manifest.is_shuffled else extra[extra == 0]
        found = np.union1d(starts, extra)
        return found[(found >= start) & (found < stop)].astype(np.int64)

    def _read_group(self, group: int) -> np.ndarray:
        number, index = divmod(group, self._manifest.file_blocks // self._manifest.group_blocks)
        path = self._folder / self._entry.files[number].name
        pyarrow, parquet = arrow(path)
        try:
            with parquet.ParquetFile(path, pre_buffer=False, memory_map=True) as file:
                self._check_declared(file, group, index, path)
                column = file.read_row_group(index, [IDS_COLUMN], use_threads=False).column(0)
                return self._tokens(column.combine_chunks(), path)
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            if isinstance(error, OSError) and error.errno:
                raise unreadable(path, error) from None
            raise self._altered(path, one_line(error, 100)) from None

    def _check_declared(self, file: Any, group: int, index: int, path: Path) -> None:
        """Compares the footer with the manifest before any page is decoded."""
        expected = min(self._group_tokens, len(self) - group * self._group_tokens)
        row_group = file.metadata.row_group(index)
        kind = str(file.schema_arrow.field(IDS_COLUMN).type)
        rows = _rows(expected, self._manifest)
        declared = row_group.column(0).num_values
        if row_group.num_rows != rows or declared != expected or not kind.endswith("int32>"):
            raise self._altered(path, f"{row_group.num_rows} rows with {declared} ids, {kind}")

    def _tokens(self, column: Any, path: Path) -> np.ndarray:
        length = self._manifest.sequence_length
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        ids = column.flatten().to_numpy(zero_copy_only=False)
        if (lengths[:-1] != length).any() or lengths[-1] > length or ids.dtype != np.int32:
            raise self._altered(path, "its rows have other lengths")
        if ids.min() < 0 or ids.max() >= self._manifest.vocab_size:
            raise self._altered(path, f"ids beyond the vocabulary of {self._manifest.vocab_size}")
        return ids.astype(self.dtype)

    def _altered(self, path: Path, reason: str) -> DataError:
        return DataError(f"{path}: is not the file that the manifest describes ({reason})")
