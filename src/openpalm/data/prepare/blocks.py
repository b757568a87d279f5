"""`openpalm data blocks`: token ids in rows of one length, as parquet files.

The tokens are prepared first, in a folder inside the output: this takes most of the time, and it
resumes after a kill. Then they are cut into rows, one file after the other; a file that exists is
complete.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from openpalm.base.files import atomic_file, lock, sha256_of, write_atomically
from openpalm.base.permutation import order_key, shuffled
from openpalm.data.corpus.line_streams import Unavailable
from openpalm.data.corpus.sources import find_sources
from openpalm.data.corpus.tables import IDS_COLUMN, arrow
from openpalm.data.dataset import blocks
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.blocks import BlocksManifest, is_blocks, read_blocks_manifest
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.manifest import SPLITS, FileEntry, Manifest, SplitEntry
from openpalm.data.dataset.shards import Dataset, open_dataset
from openpalm.data.prepare.preparation import (
    TOKENIZER,
    PrepareRequest,
    Progress,
    prepare,
    refuse_own_output,
    unchanged,
)
from openpalm.errors import DataError, StorageError, count_of

TOKENS = "tokens.partial"
"""folder of the prepared tokens, removed at the end"""
SETTINGS = "blocks.partial"
"""the settings that an unfinished folder was begun with"""
OUR_NAMES = re.compile(
    r"(train|val)-\d{5}\.parquet|tokenizer\.json|(tokens|blocks)\.partial"
    r"|\.((train|val)-\d{5}\.parquet|blocks\.partial|manifest\.json)\.partial-\d+"
)
NOT_COMPARED = ("format", "splits", *manifest_file.NOT_IN_FILE)

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress bar of a stage of the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksRequest:
    """How to cut the tokens of `prepare` into rows. DataError for a value out of range.

    seed: shuffles the order of the rows, None for the order of the text; rest: whether the tokens
    at the end that fill no row are dropped, or are a shorter last row.
    """

    prepare: PrepareRequest
    sequence_length: int = 8192
    seed: int | None = None
    rest: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        if not 1 < self.sequence_length <= blocks.MAX_BLOCK_TOKENS:
            raise DataError(
                f"--seq-len {self.sequence_length}: must be 2 to {blocks.MAX_BLOCK_TOKENS}"
            )
        if self.seed is not None and self.seed < 0:
            raise DataError(f"--seed {self.seed}: must be 0 or more")

    @property
    def order(self) -> str:
        return blocks.TEXT_ORDER if self.seed is None else f"{blocks.SHUFFLED}{self.seed}"

    @property
    def settings(self) -> dict[str, object]:
        return {"seq-len": self.sequence_length, "seed": self.seed, "rest": self.rest}


def write_blocks(
    request: BlocksRequest, stage: Stage = lambda name: nullcontext(lambda done, total: None)
) -> BlocksManifest:
    """Writes the inputs as blocks to `request.prepare.out`, in bounded memory.

    The only input may be a prepared dataset or a folder of blocks: its tokens are used as they are.
    The same request resumes after a kill, and leaves finished blocks as they are
    (`manifest.unchanged`). Raises DataError and StorageError like `prepare`.
    """
    out = request.prepare.out
    arrow(out)
    given = _dataset_given(request)
    if is_blocks(out):
        found = _finished(request, given, stage)
        _remove_scratch(out)
        return found
    if given is None:
        inputs = find_sources(request.prepare.inputs, text_field=request.prepare.text_field)
        refuse_own_output(inputs, out)
    with _claim(request):
        dataset, left_out = (given, {}) if given else _tokens(request, stage)
        with stage("writing blocks") as progress:
            manifest = _cut(dataset, request, progress)
        write_atomically(out / manifest_file.NAME, manifest.to_json())
        _remove_scratch(out)
    return replace(manifest, left_out=left_out)


def _dataset_given(request: BlocksRequest) -> Dataset | None:
    """The dataset, if the only input is one."""
    folder = Path(request.prepare.inputs[0]) if len(request.prepare.inputs) == 1 else None
    known = (manifest_file.FORMAT, blocks.FORMAT)
    if folder is None or manifest_file.format_of(folder) not in known:
        return None
    dataset = open_dataset(folder)
    if folder.resolve() == request.prepare.out.resolve():
        raise DataError(f"--out {request.prepare.out}: is the input; choose another --out")
    return dataset


def _tokens(request: BlocksRequest, stage: Stage) -> tuple[Dataset, dict[str, int]]:
    folder = request.prepare.out / TOKENS
    with stage("preparing") as progress:
        manifest = prepare(replace(request.prepare, out=folder), progress)
    return open_dataset(folder), manifest.left_out


def _finished(request: BlocksRequest, given: Dataset | None, stage: Stage) -> BlocksManifest:
    """The blocks in `out`. Raises DataError where the request asks for others."""
    out = request.prepare.out
    existing = read_blocks_manifest(out)
    wanted = (request.sequence_length, request.order)
    kept = not any(existing.rest.values())
    whole = all(entry.tokens % existing.sequence_length == 0 for entry in existing.splits.values())
    # With no rest at all both choices give the same files.
    same_rest = whole if request.rest == "drop" else kept
    if wanted != (existing.sequence_length, existing.order) or not same_rest:
        raise DataError(
            f"--out {out}: already holds blocks of {existing.sequence_length} tokens, order "
            f"{existing.order}, made with another --seq-len, --seed or --rest; choose another --out"
        )
    if given is None:
        with stage("comparing") as progress:
            return unchanged(request.prepare, existing, progress)
    names = [field.name for field in fields(Manifest) if field.name not in NOT_COMPARED]
    if any(getattr(given.manifest, name) != getattr(existing, name) for name in names):
        raise DataError(f"--out {out}: already holds blocks of other data; choose another --out")
    return replace(existing, unchanged=True)


@contextmanager
def _claim(request: BlocksRequest) -> Iterator[None]:
    """Locks the output folder, and checks that unfinished work in it has the same settings."""
    out, settings = request.prepare.out, json.dumps(request.settings).encode()
    _refuse_foreign(out)
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        try:
            if not lock(handle):
                raise DataError(f"--out {out}: another process is writing it; wait for it")
            if (out / SETTINGS).exists() and (out / SETTINGS).read_bytes() != settings:
                raise DataError(
                    f"--out {out}: holds unfinished blocks (other --seq-len, --seed or --rest); "
                    "repeat the command that began it, choose another --out, or remove it first"
                )
            write_atomically(out / SETTINGS, settings)
            yield
        finally:
            os.close(handle)
    except DataError as error:
        if new and not isinstance(error, Unavailable):
            _remove_unfinished(out)
        raise
    except OSError as error:
        raise StorageError(
            f"--out {error.filename or out}: cannot be written ({error.strerror}); "
            "free some space and repeat the command (it continues), or choose another --out"
        ) from None


def _refuse_foreign(out: Path) -> None:
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file:
        raise DataError(f"--out {out}: {file} is a file; name a folder")
    names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    foreign = [name for name in names if not OUR_NAMES.fullmatch(name)]
    # A kill while the settings were written leaves nothing but their temporary file.
    begun = SETTINGS in names or all(".partial-" in name for name in names)
    if foreign or not begun:
        odd = (foreign or names)[0]
        raise DataError(f"--out {out}: holds {odd}, which is not ours; choose a new folder")


def _remove_unfinished(out: Path) -> None:
    shutil.rmtree(out / TOKENS, ignore_errors=True)
    with suppress(OSError):
        for entry in list(out.iterdir()):
            if OUR_NAMES.fullmatch(entry.name) and entry.is_file():
                entry.unlink()
        out.rmdir()


def _remove_scratch(out: Path) -> None:
    shutil.rmtree(out / TOKENS, ignore_errors=True)
    for path in list(out.iterdir()):
        if path.name == SETTINGS or ".partial-" in path.name:
            path.unlink(missing_ok=True)


def _cut(dataset: Dataset, request: BlocksRequest, progress: Progress) -> BlocksManifest:
    tokenizer, manifest = dataset.tokenizer(), dataset.manifest
    group, file = blocks.sizes(request.sequence_length)
    total = sum(entry.tokens for entry in manifest.splits.values())
    splits, rest, done = {}, {}, 0
    for split in SPLITS:
        cutter = _Cutter(dataset, split, request, group, file)
        cutter.refuse_empty()
        entries = []
        for entry in cutter.files():
            entries.append(entry)
            written = done + min(cutter.kept, len(entries) * file * request.sequence_length)
            progress(written * manifest_file.ITEM_BYTES[manifest.dtype], total * 2)
        splits[split] = cutter.entry(tuple(entries), tokenizer.byte_lengths())
        rest[split] = cutter.tokens - cutter.kept
        done += cutter.kept
    tokenizer.save(request.prepare.out / TOKENIZER)
    described = {f.name: getattr(manifest, f.name) for f in fields(Manifest)}
    return BlocksManifest(
        **described | {"format": blocks.FORMAT, "splits": splits, "unchanged": False},
        sequence_length=request.sequence_length,
        order=request.order,
        group_blocks=group,
        file_blocks=file,
        rest=rest,
    )


class _Cutter:
    """Cuts the tokens of a split into rows. `tokens` of it exist, `kept` are in rows."""

    def __init__(self, dataset: Dataset, split: str, request: BlocksRequest, group: int, file: int):
        self._dataset, self._split, self._request = dataset, split, request
        self._group, self._file = group, file
        dataset.check(split)
        self.tokens = dataset.manifest.splits[split].tokens
        self._full = self.tokens // request.sequence_length
        self.kept = self._full * request.sequence_length if request.rest == "drop" else self.tokens
        self._rows = -(-self.kept // request.sequence_length)

    def refuse_empty(self) -> None:
        if self._split == "train" and not self._rows:
            raise DataError(
                f"too little text: {count_of(self.tokens, 'token')} for the train split fill no "
                f"block of {self._request.sequence_length}; give more text, a smaller --seq-len, "
                "or --rest keep"
            )

    def files(self) -> Iterator[FileEntry]:
        """Writes the files that are not there yet."""
        for number, first in enumerate(range(0, self._rows, self._file)):
            path = self._request.prepare.out / blocks.block_file(self._split, number)
            if not path.exists():
                self._write(path, first, min(first + self._file, self._rows))
            yield FileEntry(path.name, path.stat().st_size, sha256_of(path))

    def entry(self, files: tuple[FileEntry, ...], lengths: np.ndarray) -> SplitEntry:
        """The split's counts, without the text of the dropped tokens."""
        before = self._dataset.manifest.splits[self._split]
        if self.kept == self.tokens:
            return replace(before, files=files)
        rest = self._dataset.array(self._split)[self.kept : self.tokens]
        documents = Documents([self._dataset], self._split).count(self.kept) if self.kept else 0
        size = before.bytes - int(lengths[rest].sum())
        return replace(before, documents=documents, tokens=self.kept, bytes=size, files=files)

    def _write(self, path: Path, first: int, last: int) -> None:
        pyarrow, parquet = arrow(path)
        schema = pyarrow.schema([(IDS_COLUMN, pyarrow.list_(pyarrow.int32()))])
        # Mapped again for each file: pages of a mapping count as memory as long as it lives.
        tokens, length = self._dataset.array(self._split), self._request.sequence_length
        options = {"compression": "zstd", "write_statistics": False}
        with atomic_file(path) as file, parquet.ParquetWriter(file, schema, **options) as writer:
            for start in range(first, last, self._group):
                rows = [self._row(i) for i in range(start, min(start + self._group, last))]
                ids = np.concatenate([tokens[i * length : (i + 1) * length] for i in rows])
                offsets = np.append(np.arange(0, len(ids), length), len(ids)).astype(np.int32)
                column = pyarrow.ListArray.from_arrays(offsets, ids.astype(np.int32))
                writer.write_table(pyarrow.table([column], schema=schema), len(rows))

    def _row(self, i: int) -> int:
        """The block of the text that is row `i`; a short last one stays last."""
        if self._request.seed is None or i >= self._full:
            return i
        return shuffled(i, self._full, order_key(self._request.seed, 0))
