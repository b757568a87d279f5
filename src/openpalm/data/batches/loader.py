"""Token shards or chat records become Batches, endlessly, in an order that one seed fixes.

The order is over global rows: every number of ranks sees the same rows in the same step, and the
count of rows taken so far is all that resuming needs. Knows no model and no device.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openpalm.base.permutation import mix64, order_key, shuffled
from openpalm.data.batches.order import Cursor, Draws, Order, shuffle, windows
from openpalm.data.batches.packing import best_fit
from openpalm.data.dataset.document_index import Documents
from openpalm.data.text.conversation import Example
from openpalm.errors import DataError, count_of

IGNORE = -100
PAD_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs, targets: int64 [rows, time]; a target of IGNORE does not count.

    segments: which sequence of its row each position belongs to, where a row holds several.
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        segments = None if self.segments is None else self.segments.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), segments)


class Tokens(Protocol):
    """A one-dimensional array of ids: a split of a dataset, or a NumPy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class TokenLoader:
    """Windows of `sequence_length` + 1 tokens, each token of an epoch a target at most once.

    `rows` is for each rank; `draws` says where windows begin, in the place of `order.windows`.
    With `documents`, each of them is a segment of its row; the first token of one is still a
    target, of the end of the one before. Raises DataError if there are too few tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        sequence_length: int,
        rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        draws: Draws | None = None,
        documents: Documents | None = None,
    ):
        self._tokens, self._length, self._documents = tokens, sequence_length, documents
        self._draws = draws or windows(len(tokens), sequence_length, seed)
        self.windows = self._draws.epoch
        identity = {
            "kind": "tokens",
            "seed": seed,
            "sequence_length": sequence_length,
            "tokens": len(tokens),
            "sample": _sample(tokens),
        }
        self._cursor = Cursor(identity | self._draws.identity, rows, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts = [self._draws.item(row) for row in self._cursor.take()]
        length, documents = self._length, self._documents
        taken = np.stack([self._tokens[start : start + length + 1] for start in starts])
        whole = torch.from_numpy(taken.astype(np.int64))
        batch = Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())
        if documents is None:
            return batch
        segments = np.stack([documents.segments(start, start + length) for start in starts])
        return replace(batch, segments=torch.from_numpy(segments))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)


class ExampleLoader:
    """Records shuffled every epoch, one a row, padded on the right to the longest of the batch.

    Records longer than `sequence_length` are cut at the end (`truncated` counts them). Targets
    outside the loss mask are IGNORE. `draws` puts a mixture in the place of the
    shuffle.
    """

    def __init__(
        self,
        records: Sequence[Example],
        *,
        rows: int,
        seed: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        draws: Draws | None = None,
    ):
        self._records, self._length = records, sequence_length
        identity = {"kind": "records", **_identity(records, seed, sequence_length)}
        draws = draws or shuffle(len(records), seed)
        self.rows_per_epoch = draws.epoch
        self._order = Order(
            len(records),
            identity,
            rows=rows,
            seed=seed,
            rank=rank,
            world_size=world_size,
            draws=draws,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch(*padded([self._records[i] for i in self._order.take()], self._length))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._order.load_state_dict(state)


class PackedLoader:
    """Rows of up to `sequence_length` tokens that hold several records each, one after the other.

    Every epoch the records come in an order of its own and are packed by best fit, and the rows
    are shuffled. As many records are seen, cut and learnt from as by an ExampleLoader.
    """

    def __init__(
        self,
        records: Sequence[Example],
        *,
        rows: int,
        seed: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        draws: Draws | None = None,
    ):
        self._records, self._length, self._seed = records, sequence_length, seed
        identity = {"kind": "packed", **_identity(records, seed, sequence_length)}
        self._draws = draws or shuffle(len(records), seed)
        self._cursor = Cursor(identity | self._draws.identity, rows, rank, world_size)
        self._starts = [0]  # the first row of every epoch that was packed so far, and of the next
        self._epoch, self._packed = -1, list[list[int]]()
        self._pack(0)
        self.rows_per_epoch = len(self._packed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = [[self._records[i] for i in self._row(row)] for row in self._cursor.take()]
        return packed(rows, self._length)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)

    def _row(self, row: int) -> list[int]:
        while row >= self._starts[-1]:
            self._pack(len(self._starts) - 1)
        epoch = bisect_right(self._starts, row) - 1
        self._pack(epoch)
        index = row - self._starts[epoch]
        return self._packed[shuffled(index, len(self._packed), order_key(mix64(self._seed), epoch))]

    def _pack(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        first = epoch * self._draws.epoch
        items = [self._draws.item(first + draw) for draw in range(self._draws.epoch)]
        lengths = (min(len(self._records[i].ids) - 1, self._length) for i in items)
        self._packed = [[items[n] for n in row] for row in best_fit(lengths, self._length)]
        self._epoch = epoch
        if epoch == len(self._starts) - 1:
            self._starts.append(self._starts[-1] + len(self._packed))


def padded(records: Sequence[Example], sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [records, time], padded on the right to the longest, cut at the end.

    The width is a multiple of PAD_MULTIPLE up to `sequence_length`.
    """
    batch = packed([[record] for record in records], sequence_length)
    return batch.inputs, batch.targets


def packed(rows: Sequence[Sequence[Example]], sequence_length: int) -> Batch:
    """Each row's records one after the other, each cut at the end; what is left is padding.

    A record is a segment of its row; the padding, too, is one of its own.
    """
    sizes = [[min(len(record.ids) - 1, sequence_length) for record in row] for row in rows]
    widest = max(map(sum, sizes))
    width = min(-(-widest // PAD_MULTIPLE) * PAD_MULTIPLE, sequence_length)
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets, segments = torch.full_like(inputs, IGNORE), torch.full_like(inputs, -1)
    for n, row in enumerate(rows):
        end = 0
        for segment, (record, size) in enumerate(zip(row, sizes[n], strict=True)):
            start, end = end, end + size
            ids = torch.tensor(record.ids[: size + 1])
            counts = torch.tensor(record.loss_mask[1 : size + 1])
            inputs[n, start:end] = ids[:-1]
            targets[n, start:end] = ids[1:].where(counts, IGNORE)
            segments[n, start:end] = segment
    return Batch(inputs, targets, segments)


def truncated(records: Iterable[Example], sequence_length: int) -> int:
    """How many records an ExampleLoader of that length cuts."""
    return sum(len(record.ids) > sequence_length + 1 for record in records)


def evaluation_batches(
    tokens: Tokens, *, sequence_length: int, rows: int, documents: Documents | None = None
) -> Iterator[Batch]:
    """The whole split in order: each token but the first is a target exactly once.

    The last window is padded with IGNORE; the last batch may have fewer rows. `documents` are
    segments as a TokenLoader's. Raises DataError where there is nothing to predict.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise DataError(
            f"nothing to predict in {count_of(len(tokens), 'token')}; use more validation text"
        )
    for first in range(0, targets, rows * sequence_length):
        chunk = tokens[first : first + rows * sequence_length + 1].astype(np.int64)
        inputs = _windowed(chunk[:-1], sequence_length, 0)
        batch = Batch(inputs, _windowed(chunk[1:], sequence_length, IGNORE))
        if documents is not None:
            segments = documents.segments(first, first + len(chunk) - 1)
            batch = replace(batch, segments=_windowed(segments, sequence_length, -1))
        yield batch


def _windowed(values: np.ndarray, sequence_length: int, fill: int) -> Tensor:
    """Rows of `sequence_length`, one after the other; `fill` is what is left of the last."""
    rows = np.full((-(-len(values) // sequence_length), sequence_length), fill, dtype=np.int64)
    rows.flat[: len(values)] = values
    return torch.from_numpy(rows)


def _sample(tokens: Tokens) -> str:
    """A digest of both ends of the data: cheap, and different data differ there."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokens[:4096], tokens[max(0, len(tokens) - 4096) :]):
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def _identity(records: Sequence[Example], seed: int, sequence_length: int) -> dict[str, Any]:
    """What tells these records from others; raises DataError where one teaches nothing."""
    short = sum(len(record.ids) < 2 for record in records)
    if short or not records:
        raise DataError(
            f"of {count_of(len(records), 'record')} {short} with fewer than 2 tokens to learn "
            "from; leave those out, and give at least one"
        )
    return {
        "seed": seed,
        "sequence_length": sequence_length,
        "records": len(records),
        "sample": _records_digest(records),
    }


def _records_digest(records: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(np.array([len(record.ids), *record.ids], dtype="<i8").tobytes())
        digest.update(bytes(record.loss_mask))
    return digest.hexdigest()
