"""Token shards or chat records become Batches, endlessly, in an order that one seed fixes.

The order is over global rows: every number of ranks sees the same rows in the same step, and the
count of rows taken so far is all that resuming needs. Knows no model and no device.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openpalm.data.conversation import Rendered as Record
from openpalm.errors import DataError

IGNORE = -100
PAD_MULTIPLE = 16
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs, targets: int64 [rows, time]; a target of IGNORE does not count."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.inputs.to(device), self.targets.to(device))


class Tokens(Protocol):
    """A one-dimensional array of ids: a split of a dataset, or a NumPy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class _Cursor:
    """Which global rows come next on this rank, and what identifies their order.

    A step takes world_size * rows consecutive global rows; a rank's share of them is contiguous.
    """

    def __init__(self, identity: dict[str, Any], rows: int, rank: int, world_size: int):
        if rows < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rows {rows}, rank {rank} of {world_size}: out of range")
        self._identity, self._rows = identity, rows
        self._rank, self._world_size = rank, world_size
        self._consumed = 0

    def take(self) -> range:
        first = self._consumed + self._rank * self._rows
        self._consumed += self._world_size * self._rows
        return range(first, first + self._rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows_consumed": self._consumed, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        differing = [k for k, v in self._identity.items() if state.get(k) != v]
        if differing:
            told = ", ".join(
                f"{k} {state.get(k)} instead of {self._identity[k]}" for k in differing
            )
            raise DataError(f"the data cursor is of other data ({told}); resume with the same data")
        consumed = state.get("rows_consumed")
        if type(consumed) is not int or consumed < 0:
            raise DataError(f"the data cursor's rows_consumed is {consumed!r}; it is damaged")
        self._consumed = consumed


class Order:
    """Indices of `size` items, all of them once an epoch, shuffled anew each time."""

    def __init__(
        self,
        size: int,
        identity: dict[str, Any],
        *,
        rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._cursor = _Cursor(identity, rows, rank, world_size)
        self._size, self._seed = size, seed

    def take(self) -> list[int]:
        """The next `rows` indices of this rank."""
        return [self._index(row) for row in self._cursor.take()]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)

    def _index(self, row: int) -> int:
        epoch, index = divmod(row, self._size)
        return shuffled(index, self._size, _key(self._seed, epoch))


class TokenLoader:
    """Windows of `sequence_length` + 1 tokens, each token of an epoch a target at most once.

    An epoch starts at a phase drawn from (seed, epoch), so that the windows' edges move, and
    shuffles its windows. `rows` is for each rank. Raises DataError if there are too few tokens.
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
    ):
        if len(tokens) < sequence_length + 1:
            raise DataError(
                f"sequence_length {sequence_length}: needs {sequence_length + 1} tokens, the data "
                f"has {len(tokens)}; use a shorter sequence or more text"
            )
        self._tokens, self._length, self._seed = tokens, sequence_length, seed
        # Room for the largest phase, unless that would leave no window.
        moved = (len(tokens) - sequence_length) // sequence_length
        self._moves = moved >= 1
        self.windows = moved if self._moves else (len(tokens) - 1) // sequence_length
        identity = {
            "kind": "tokens",
            "seed": seed,
            "sequence_length": sequence_length,
            "tokens": len(tokens),
            "sample": _sample(tokens),
        }
        self._cursor = _Cursor(identity, rows, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        windows = np.stack([self._window(row) for row in self._cursor.take()])
        whole = torch.from_numpy(windows)
        return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)

    def _window(self, row: int) -> np.ndarray:
        epoch, index = divmod(row, self.windows)
        key = _key(self._seed, epoch)
        phase = _mix(key) % self._length if self._moves else 0
        start = phase + shuffled(index, self.windows, key) * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int64)


class RecordLoader:
    """Records shuffled every epoch, one a row, padded on the right to the longest of the batch.

    Records longer than `sequence_length` are cut at the end (`truncated` counts them). Targets
    outside the loss mask are IGNORE.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        rows: int,
        seed: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        short = sum(len(record.ids) < 2 for record in records)
        if short or not records:
            raise DataError(
                f"{short} of {len(records)} records have fewer than 2 tokens to learn from; "
                "leave them out, and give at least one"
            )
        self._records, self._length = records, sequence_length
        identity = {
            "kind": "records",
            "seed": seed,
            "sequence_length": sequence_length,
            "records": len(records),
            "sample": _records_digest(records),
        }
        self._order = Order(
            len(records), identity, rows=rows, seed=seed, rank=rank, world_size=world_size
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


def padded(records: Sequence[Record], sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [records, time], padded on the right to the longest, cut at the end.

    The width is a multiple of PAD_MULTIPLE up to `sequence_length`.
    """
    widest = max(min(len(record.ids) - 1, sequence_length) for record in records)
    width = min(-(-widest // PAD_MULTIPLE) * PAD_MULTIPLE, sequence_length)
    inputs = torch.zeros(len(records), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, record in enumerate(records):
        ids = torch.tensor(record.ids[: width + 1])
        counts = torch.tensor(record.loss_mask[1 : width + 1])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(counts, IGNORE)
    return inputs, targets


def truncated(records: Iterable[Record], sequence_length: int) -> int:
    """How many records a RecordLoader of that length cuts."""
    return sum(len(record.ids) > sequence_length + 1 for record in records)


def evaluation_batches(tokens: Tokens, *, sequence_length: int, rows: int) -> Iterator[Batch]:
    """The whole split in order: each token but the first is a target exactly once.

    The last window is padded with IGNORE; the last batch may have fewer rows. Raises DataError
    where there is nothing to predict.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise DataError(f"{len(tokens)} tokens give nothing to predict; use more validation text")
    for first in range(0, targets, rows * sequence_length):
        chunk = tokens[first : first + rows * sequence_length + 1].astype(np.int64)
        count = len(chunk) - 1
        shape = (-(-count // sequence_length), sequence_length)
        inputs = np.zeros(shape, dtype=np.int64)
        wanted = np.full(shape, IGNORE, dtype=np.int64)
        inputs.flat[:count] = chunk[:-1]
        wanted.flat[:count] = chunk[1:]
        yield Batch(torch.from_numpy(inputs), torch.from_numpy(wanted))


def shuffled(index: int, size: int, key: int) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names.

    A four-round Feistel network over the next even power of two, walked until it is back inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): no table in memory however
    many windows, and an order that no library's next version changes.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key + (turn << 56) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def _key(seed: int, epoch: int) -> int:
    return _mix(_mix(seed) + epoch)


def _mix(value: int) -> int:
    """A 64-bit number that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _sample(tokens: Tokens) -> str:
    """A digest of both ends of the data: cheap, and different data differ there."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokens[:4096], tokens[max(0, len(tokens) - 4096) :]):
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def _records_digest(records: Sequence[Record]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(np.array([len(record.ids), *record.ids], dtype="<i8").tobytes())
        digest.update(bytes(record.loss_mask))
    return digest.hexdigest()
