"""Documents become packed token shards with an index; prepared datasets are opened again.

DIR/tokenizer.json
DIR/{train,val}-00000.bin   token ids, little-endian uint16 (uint32 above 65536 ids)
DIR/{train,val}-00000.idx   uint64: where in the split's tokens each document starts
DIR/manifest.json           written last: while it is missing, there is no dataset
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openpalm.data import manifest as manifest_file
from openpalm.data.corpus import Document, Source, find_sources, read_source
from openpalm.data.manifest import Manifest, PrepareSettings, SplitEntry
from openpalm.data.scan import Part, Plan, parts, scan
from openpalm.data.tokenizer import Tokenizer, bpe_size, is_bpe
from openpalm.data.writing import OUR_NAMES, PARTIAL, SplitWriter, claimed, commit
from openpalm.errors import DataError

BATCH_CHARACTERS = 2 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """What to prepare, how, and where to. Raises DataError for a value out of range."""

    inputs: Sequence[str]
    out: Path
    tokenizer: str
    text_field: str = "text"
    val_fraction: float = 0.05
    val: str = "hash"
    dedup: str = "exact"
    shard_tokens: int = 1 << 28

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: must lie between 0 and 1")
        if self.val != "hash":
            tail_fraction(self.val)
        if self.dedup not in ("exact", "none"):
            raise DataError(f"--dedup {self.dedup}: must be exact or none")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if is_bpe(self.tokenizer):
            bpe_size(self.tokenizer)

    @property
    def settings(self) -> PrepareSettings:
        names = PrepareSettings.__dataclass_fields__
        return PrepareSettings(**{name: getattr(self, name) for name in names})


def tail_fraction(val: str) -> float | None:
    """F of `tail:F`; None for `hash`. Raises DataError otherwise."""
    if val == "hash":
        return None
    found = re.fullmatch(r"tail:(0?\.\d+)", val)
    if not found or not float(found[1]):
        raise DataError(f"--val {val}: must be hash or tail:F with F between 0 and 1 (tail:0.1)")
    return float(found[1])


def prepare(request: PrepareRequest, progress: Progress | None = None) -> Manifest:
    """Writes `request.inputs` as a dataset to `request.out`, in memory bounded by one document.

    All inputs are validated before anything is written. A BPE vocabulary is learnt from training
    text only. Repeating it changes nothing (`manifest.unchanged`). `progress` is told (bytes done,
    bytes in total). Raises DataError for inputs or a folder that cannot be used, StorageError when
    the disk refuses.
    """
    given = None if is_bpe(request.tokenizer) else Tokenizer.from_spec(request.tokenizer, ())
    sources = find_sources(request.inputs)
    existing = _look_at(request.out)
    _refuse_own_output(sources, request.out)
    reading = _Reading(sources, request.text_field, 2 if given else 3, progress)
    plan = scan(
        sources,
        text_field=request.text_field,
        val_fraction=request.val_fraction,
        tail_fraction=tail_fraction(request.val),
        dedup=request.dedup == "exact",
        advance=reading.advance,
    )
    if existing:
        return _same_or_refuse(existing, request, plan, given)
    texts = (part.text for part in parts(plan, reading.documents()) if part.split == "train")
    tokenizer = given or Tokenizer.from_spec(request.tokenizer, texts)
    with claimed(request.out) as partial:
        made = _write(request, plan, tokenizer, parts(plan, reading.documents()))
        commit(request.out, partial, made)
    return made


def open_dataset(path: str | Path) -> "Dataset":
    """A prepared dataset. Raises DataError where it is missing, torn or altered in size."""
    path = Path(path)
    return Dataset(path, manifest_file.read_manifest(path))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset on disk; nothing is read before it is asked for."""

    path: Path
    manifest: Manifest

    def tokenizer(self) -> Tokenizer:
        """Raises DataError if tokenizer.json is not the one the tokens were made with."""
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

    def tokens(self, split: str) -> "TokenArray":
        files = self.manifest.splits[split].files[::2]
        paths = [self.path / file.name for file in files]
        return TokenArray(paths, self.manifest.dtype, self.manifest.vocab_size)

    def document_offsets(self, split: str) -> np.ndarray:
        """int64 [documents]: where each starts in the split's tokens. DataError if torn."""
        entry = self.manifest.splits[split]
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


class _Reading:
    """Reads the sources again and again, and says how far all passes together are."""

    def __init__(
        self, sources: list[Source], text_field: str, passes: int, progress: Progress | None
    ):
        self._sources, self._text_field, self._progress = sources, text_field, progress
        self._done = 0
        self._total = passes * sum(_size(source) for source in sources) if progress else 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def documents(self) -> Iterator[Document]:
        for source in self._sources:
            yield from read_source(
                source, text_field=self._text_field, tap=lambda data: self.advance(len(data))
            )


class _Piece(NamedTuple):
    split: str
    text: str
    starts: bool
    ends: bool


def _write(
    request: PrepareRequest, plan: Plan, tokenizer: Tokenizer, documents: Iterable[Part]
) -> Manifest:
    tokenizer.save(request.out / "tokenizer.json")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(request.out, split, dtype, request.shard_tokens))
            for split in manifest_file.SPLITS
        }
        _write_tokens(tokenizer, documents, writers)
        splits = {split: writer.close() for split, writer in writers.items()}
    _refuse_tiny(splits)
    return Manifest(
        format=manifest_file.FORMAT,
        version=manifest_file.VERSION,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.digest,
        split_by=plan.split_by,
        settings=request.settings,
        inputs=plan.inputs,
        documents=plan.counts,
        splits=splits,
    )


def _write_tokens(
    tokenizer: Tokenizer, documents: Iterable[Part], writers: dict[str, SplitWriter]
) -> None:
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for batch in _batches(documents, tokenizer, writers):
        encoded = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            writers[piece.split].add(ids + end if piece.ends else ids, starts=piece.starts)


def _batches(
    documents: Iterable[Part], tokenizer: Tokenizer, writers: dict[str, SplitWriter]
) -> Iterator[list[_Piece]]:
    """Pieces of documents, some BATCH_CHARACTERS at a time: enough for all cores."""
    batch: list[_Piece] = []
    size = 0
    for part in documents:
        writers[part.split].bytes += part.size
        texts = tokenizer.cut(part.text)
        last = len(texts) - 1
        for i, text in enumerate(texts):
            batch.append(_Piece(part.split, text, part.starts and i == 0, part.ends and i == last))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _refuse_tiny(splits: dict[str, SplitEntry]) -> None:
    for split, entry in splits.items():
        if entry.tokens < 2:
            raise DataError(
                f"too little text: {entry.tokens} tokens for the {split} split, at least 2 are "
                "needed; give more text or another --val-fraction"
            )


def _size(source: Source) -> int:
    if source.path is not None:
        return source.path.stat().st_size
    return sum(len(document.text.encode()) + 1 for document in read_source(source))


def _refuse_own_output(sources: list[Source], out: Path) -> None:
    folder = out.resolve()
    for source in sources:
        if source.path and folder in source.path.resolve().parents:
            raise DataError(f"{source.path}: lies inside --out {out}; choose another --out")


def _look_at(out: Path) -> Manifest | None:
    """The dataset already in `out`, if any. Raises DataError for anything that is not ours."""
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file:
        raise DataError(f"--out {out}: {file} is a file; name a folder")
    if not out.exists():
        return None
    names = {entry.name for entry in out.iterdir()}
    if manifest_file.NAME in names:
        return manifest_file.read_manifest(out)
    foreign = sorted(name for name in names if not OUR_NAMES.fullmatch(name))
    # Without our own mark, even a tokenizer.json is somebody's.
    if foreign or (names and PARTIAL not in names):
        odd = (foreign or sorted(names))[0]
        raise DataError(f"--out {out}: holds {odd}, which is not ours; choose a new folder")
    return None


def _same_or_refuse(
    existing: Manifest, request: PrepareRequest, plan: Plan, given: Tokenizer | None
) -> Manifest:
    settings = request.settings
    if given and given.digest == existing.tokenizer:
        settings = replace(settings, tokenizer=existing.settings.tokenizer)
    names = PrepareSettings.__dataclass_fields__
    differing = [n for n in names if getattr(settings, n) != getattr(existing.settings, n)]
    before, now = ([(e.bytes, e.sha256) for e in m.inputs] for m in (existing, plan))
    if before != now:
        differing.insert(0, "inputs")
    if differing:
        raise DataError(
            f"--out {request.out}: already holds another dataset (other "
            f"{', '.join(differing)}); choose another --out, or remove it first"
        )
    return replace(existing, unchanged=True)
