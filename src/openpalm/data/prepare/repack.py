"""Optional last pass of `data prepare`: repeats epochs in new orders, drops repetitive sequences.

Reads the encoded tokens of a split (files with the prefix BASE) as a stream, the training split
once an epoch, and writes the split's shards. The first epoch has the order of the inputs; in each
later one the documents are shuffled, unless the order is kept. The stream is one long row of
tokens, so with a kept order an epoch begins with the tokens behind the last whole sequence of the
epoch before it, as in mesh-transformer-jax (--preserve-data-order).

With `min_unique_tokens`, sequences of `sequence_tokens` that have fewer distinct ids are dropped.
What is left of a document behind a dropped sequence counts as a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openpalm.base.permutation import order_key, shuffled
from openpalm.data.dataset.manifest import SPLITS, PrepareSettings, SplitEntry
from openpalm.data.dataset.shards import TokenArray
from openpalm.data.prepare.progress_file import BASE, RepackPosition, UnfinishedDataset
from openpalm.data.prepare.writing import SplitWriter
from openpalm.data.text.tokenizer import Tokenizer

CHUNK_TOKENS = 1 << 20


class _Chunk(NamedTuple):
    """Consecutive tokens, and the positions in them where documents start (int64)."""

    tokens: np.ndarray
    starts: np.ndarray


def base_name(split: str, settings: PrepareSettings, shard: str | None) -> str:
    """The name of the files that encoding writes; the parts of several jobs are joined first."""
    return BASE + split if settings.repacks and not shard else split


def repack(
    unfinished: UnfinishedDataset,
    encoded: dict[str, SplitEntry],
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    dtype: str,
) -> dict[str, SplitEntry]:
    """The splits of the dataset, from those that are encoded. Resumes after a kill."""
    done = unfinished.progress.repacked or RepackPosition(SPLITS[0], 0, False, 0, {})
    splits: dict[str, SplitEntry] = {}
    lengths = tokenizer.byte_lengths() if settings.min_unique_tokens else _EMPTY.starts
    for split in SPLITS:
        if SPLITS.index(split) < SPLITS.index(done.split):
            splits[split] = done.splits[split]
            continue
        begin = done if split == done.split else RepackPosition(split, 0, False, 0, {})
        base = _Base(unfinished.folder, encoded[split], dtype, tokenizer.vocab_size)
        work = _Repacking(settings, lengths, base, unfinished, splits)
        splits[split] = work.run(split, begin, dtype)
    return splits


class _Base:
    """The encoded tokens of a split, and the documents in them."""

    def __init__(self, folder: Path, entry: SplitEntry, dtype: str, vocab_size: int):
        self.entry = entry
        paths = [folder / file.name for file in entry.files]
        self.tokens = TokenArray(paths[::2], dtype, vocab_size) if paths else None
        # An empty file cannot be mapped: a document longer than a shard leaves one.
        self._starts = [
            np.memmap(path, dtype="<u8", mode="r")
            for path, file in zip(paths[1::2], entry.files[1::2], strict=True)
            if file.size
        ]
        self._first = np.cumsum([0, *map(len, self._starts)])

    def chunks(self, begin: int) -> Iterator[_Chunk]:
        """The tokens from `begin` on in their own order."""
        for at in range(begin, self.entry.tokens, CHUNK_TOKENS):
            end = min(at + CHUNK_TOKENS, self.entry.tokens)
            yield _Chunk(self._slice(at, end), self._starts_between(at, end) - at)

    def shuffled_chunks(self, begin: int, key: int) -> Iterator[_Chunk]:
        """The tokens of all documents in a new order, from position `begin` of that order on."""
        count, position = self.entry.documents, 0
        parts: list[np.ndarray] = []
        starts: list[int] = []
        size = 0
        for rank in range(count):
            first, end = self._bounds(shuffled(rank, count, key))
            if position + end - first > begin:
                skipped = max(0, begin - position)
                starts += [] if skipped else [size]
                # A long document is read in chunks, too.
                for at in range(first + skipped, end, CHUNK_TOKENS):
                    parts.append(self._slice(at, min(at + CHUNK_TOKENS, end)))
                    size += len(parts[-1])
                    if size >= CHUNK_TOKENS:
                        yield _Chunk(np.concatenate(parts), np.array(starts, np.int64))
                        parts, starts, size = [], [], 0
            position += end - first
        if parts:
            yield _Chunk(np.concatenate(parts), np.array(starts, np.int64))

    def _slice(self, begin: int, end: int) -> np.ndarray:
        assert self.tokens is not None
        return self.tokens[begin:end]

    def _bounds(self, document: int) -> tuple[int, int]:
        last = document + 1 == self.entry.documents
        # Tokens in front of the first start belong to the first document.
        begin = self._start(document) if document else 0
        return begin, self.entry.tokens if last else self._start(document + 1)

    def _start(self, document: int) -> int:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return int(self._starts[shard][document - self._first[shard]])

    def _starts_between(self, begin: int, end: int) -> np.ndarray:
        wanted = np.array([begin, end], np.uint64)
        found = [starts[slice(*np.searchsorted(starts, wanted))] for starts in self._starts]
        return np.concatenate([*found, np.empty(0, np.uint64)]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Repacking:
    """The pass over one split; `before` has the entries of the splits that are done.

    lengths: int64 [vocabulary], the text bytes of each id, to count what is dropped.
    """

    settings: PrepareSettings
    lengths: np.ndarray
    base: _Base
    unfinished: UnfinishedDataset
    before: dict[str, SplitEntry]

    def run(self, split: str, begin: RepackPosition, dtype: str) -> SplitEntry:
        settings, encoded = self.settings, self.base.entry
        epochs = settings.repack_epochs if split == "train" else 1
        entry, position = begin.splits.get(split), begin
        shard_tokens = settings.shard_tokens
        with SplitWriter(self.unfinished.folder, split, dtype, shard_tokens, entry) as writer:
            for chunk in self._sequences(epochs, begin.read):
                position = self._write(writer, chunk, position)
                if self.unfinished.is_due():
                    splits = self.before | {split: writer.entry()}
                    self.unfinished.note(replace(position, splits=splits))
                    self.unfinished.checkpoint(*writer.files)
            writer.bytes = max(0, epochs * encoded.bytes - position.dropped_bytes)
            writer.lost = epochs * encoded.lost
            return writer.close()

    def _stream(self, epochs: int, begin: int) -> Iterator[_Chunk]:
        """All epochs one after the other, from token `begin` on."""
        settings, tokens = self.settings, self.base.entry.tokens
        first, offset = divmod(begin, max(1, tokens))
        for epoch in range(first, epochs):
            start = offset if epoch == first else 0
            if epoch == 0 or settings.keep_order:
                yield from self.base.chunks(start)
            else:
                yield from self.base.shuffled_chunks(start, order_key(settings.seed, epoch))

    def _sequences(self, epochs: int, begin: int) -> Iterator[_Chunk]:
        """The stream in chunks of whole sequences; the last chunk may end with a part of one."""
        if not self.settings.min_unique_tokens:
            yield from self._stream(epochs, begin)
            return
        length, waiting = self.settings.sequence_tokens, _EMPTY
        for chunk in self._stream(epochs, begin):
            joined = _joined(waiting, chunk)
            whole = len(joined.tokens) // length * length
            if whole:
                yield _part(joined, 0, whole)
            waiting = _part(joined, whole, len(joined.tokens))
        if len(waiting.tokens):
            yield waiting

    def _write(
        self, writer: SplitWriter, chunk: _Chunk, position: RepackPosition
    ) -> RepackPosition:
        """Writes the sequences of a chunk that are kept; returns the position behind it."""
        cut, dropped_bytes = position.cut, position.dropped_bytes
        for begin, end, kept in self._runs(chunk.tokens):
            part = _part(chunk, begin, end)
            if kept:
                starts = np.union1d(part.starts, [0]) if cut else part.starts
                writer.extend(part.tokens, starts.astype(np.int64), 0, 0)
            else:
                writer.dropped += (end - begin) // self.settings.sequence_tokens
                dropped_bytes += int(self.lengths[part.tokens].sum())
            cut = not kept
        read = position.read + len(chunk.tokens)
        return replace(position, read=read, cut=cut, dropped_bytes=dropped_bytes)

    def _runs(self, tokens: np.ndarray) -> Iterator[tuple[int, int, bool]]:
        """(begin, end, kept) of runs of sequences that are all kept or all dropped."""
        least, length = self.settings.min_unique_tokens, self.settings.sequence_tokens
        if not least:
            yield 0, len(tokens), True
            return
        rows = np.sort(tokens[: len(tokens) // length * length].reshape(-1, length), axis=1)
        kept = (rows[:, 1:] != rows[:, :-1]).sum(axis=1) + 1 >= least
        edges = [0, *(np.flatnonzero(kept[1:] != kept[:-1]) + 1).tolist(), len(kept)]
        for first, last in pairwise(edges):
            if first < last:
                yield first * length, last * length, bool(kept[first])
        # The stream ends with a part of a sequence, which is kept.
        if len(kept) * length < len(tokens):
            yield len(kept) * length, len(tokens), True


_EMPTY = _Chunk(np.empty(0, np.uint16), np.empty(0, np.int64))


def _joined(*chunks: _Chunk) -> _Chunk:
    tokens = [chunk.tokens for chunk in chunks if len(chunk.tokens)]
    starts: Sequence[np.ndarray] = []
    before = 0
    for chunk in chunks:
        starts = [*starts, chunk.starts + before]
        before += len(chunk.tokens)
    return _Chunk(np.concatenate(tokens), np.concatenate(starts))


def _part(chunk: _Chunk, begin: int, end: int) -> _Chunk:
    inside = (chunk.starts >= begin) & (chunk.starts < end)
    return _Chunk(chunk.tokens[begin:end], chunk.starts[inside] - begin)
