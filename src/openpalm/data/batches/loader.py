"""Data loaders: endless batches of token windows or examples, shuffled by one seed, resumable.

The order is over global rows: every number of ranks sees the same rows in the same step, and the
count of rows consumed is the whole state that resuming needs. Knows no model and no device.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from openpalm.data.batches.order import Cursor, Draws, shuffle, windows
from openpalm.data.batches.packing import packed_draws
from openpalm.data.dataset.document_index import Documents
from openpalm.data.text.conversation import Example
from openpalm.errors import DataError, count_of

IGNORE = -100
PAD_MULTIPLE = 16

T = TypeVar("T")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs, targets: int64 [rows, time]; a target of IGNORE is not counted in the loss.

    segments: int64 [rows, time], the sequence that each position belongs to, where a row holds
    several; attention stays within a segment.
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


class Loader(Generic[B]):
    """Endless batches of any kind of item, with a cursor that resumes at the exact batch.

    `draws` gives the item of each global row; `collate` makes a batch of `rows` items. `identity`
    describes the data, so that a cursor of other data is refused.
    """

    def __init__(
        self,
        draws: Draws[T],
        collate: Callable[[list[T]], B],
        identity: dict[str, Any],
        *,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows_per_epoch = draws.epoch
        # A closure keeps the item's type out of the class, so callers name only what batches are.
        self._batch_of = lambda numbers: collate([draws.item(number) for number in numbers])
        # The order is part of the identity: a cursor is a count and means nothing in another order.
        self._cursor = Cursor(identity | draws.identity, rows, rank, world_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> B:
        return self._batch_of(self._cursor.take())

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)


def token_loader(
    tokens: Tokens,
    *,
    sequence_length: int,
    rows: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    draws: Draws[int] | None = None,
    documents: Documents | None = None,
) -> Loader[Batch]:
    """Batches of token windows; each token of an epoch is a target at most once.

    rows: of each rank; draws: window starts, by default `order.windows`. With `documents`, each
    document is a segment of its row; the first token of a document is still a target, predicted
    from the end of the document before it. Raises DataError if there are too few tokens.
    """

    def collate(starts: list[int]) -> Batch:
        # One token more than the length: inputs and targets are the same window, one apart.
        windows = np.stack([tokens[start : start + sequence_length + 1] for start in starts])
        ids = torch.from_numpy(windows.astype(np.int64))
        # Contiguous, or every later view of the shifted halves would copy.
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        if documents is None:
            return batch
        segments = [documents.segments(start, start + sequence_length) for start in starts]
        return replace(batch, segments=torch.from_numpy(np.stack(segments)))

    identity = {
        "kind": "tokens",
        # Seed and length decide where windows begin: a count of rows means nothing with others.
        "seed": seed,
        "sequence_length": sequence_length,
        "tokens": len(tokens),
        "sample": _sample(tokens),
    }
    draws = draws or windows(len(tokens), sequence_length, seed)
    return Loader(draws, collate, identity, rows=rows, rank=rank, world_size=world_size)


def example_loader(
    examples: Sequence[Example],
    *,
    rows: int,
    seed: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    draws: Draws[int] | None = None,
) -> Loader[Batch]:
    """Batches of one example a row, padded on the right to the longest of the batch.

    Examples longer than `sequence_length` are cut at the end (`truncated` counts them). Targets
    outside the loss mask are IGNORE. draws: example numbers, by default `order.shuffle`. Raises
    DataError where an example has fewer than 2 tokens.
    """
    identity = {"kind": "records"} | _identity(examples, seed, sequence_length)
    return Loader(
        draws or shuffle(len(examples), seed),
        lambda numbers: Batch(*padded([examples[i] for i in numbers], sequence_length)),
        identity,
        rows=rows,
        rank=rank,
        world_size=world_size,
    )


def packed_loader(
    examples: Sequence[Example],
    *,
    rows: int,
    seed: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    draws: Draws[int] | None = None,
) -> Loader[Batch]:
    """Batches whose rows hold several examples each, up to `sequence_length` tokens.

    An epoch has the same examples, cut at the same length, as an epoch of `example_loader`.
    """
    identity = {"kind": "packed"} | _identity(examples, seed, sequence_length)
    draws = draws or shuffle(len(examples), seed)
    # Once, because packing reads the lengths of a whole epoch at a time.
    lengths = [_length(example, sequence_length) for example in examples]
    return Loader(
        # The draws are whole rows here, so that the cursor counts rows and not examples.
        packed_draws(draws, lengths, sequence_length, seed),
        lambda rows: packed([[examples[i] for i in row] for row in rows], sequence_length),
        identity,
        rows=rows,
        rank=rank,
        world_size=world_size,
    )


def padded(examples: Sequence[Example], sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [examples, time], padded on the right to the longest, cut at the end.

    The width is a multiple of PAD_MULTIPLE up to `sequence_length`.
    """
    batch = packed([[example] for example in examples], sequence_length)
    return batch.inputs, batch.targets


def packed(rows: Sequence[Sequence[Example]], sequence_length: int) -> Batch:
    """One row of tokens for each list of examples, concatenated and padded on the right.

    Each example, cut at `sequence_length`, is a segment of its row; the padding is segment -1.
    """
    sizes = [[_length(example, sequence_length) for example in row] for row in rows]
    widest = max(map(sum, sizes))
    # Few different widths: compiled kernels are made for each shape.
    width = min(-(-widest // PAD_MULTIPLE) * PAD_MULTIPLE, sequence_length)
    # Padding may be any id: nothing attends to it and its targets are IGNORE.
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets, segments = torch.full_like(inputs, IGNORE), torch.full_like(inputs, -1)
    for n, row in enumerate(rows):
        end = 0
        for segment, (example, size) in enumerate(zip(row, sizes[n], strict=True)):
            start, end = end, end + size
            ids = torch.tensor(example.ids[: size + 1])
            # The mask is of ids; shifted by one, it is of targets.
            counts = torch.tensor(example.loss_mask[1 : size + 1])
            inputs[n, start:end] = ids[:-1]
            targets[n, start:end] = ids[1:].where(counts, IGNORE)
            segments[n, start:end] = segment
    return Batch(inputs, targets, segments)


def _length(example: Example, sequence_length: int) -> int:
    """Inputs of an example: all its tokens but the last, up to `sequence_length`."""
    return min(len(example.ids) - 1, sequence_length)


def truncated(examples: Iterable[Example], sequence_length: int) -> int:
    """The number of examples that a loader of that length cuts."""
    return sum(len(example.ids) > sequence_length + 1 for example in examples)


def evaluation_batches(
    tokens: Tokens, *, sequence_length: int, rows: int, documents: Documents | None = None
) -> Iterator[Batch]:
    """The whole split in order: each token but the first is a target exactly once.

    The last window is padded with IGNORE; the last batch may have fewer rows. `documents` are
    segments as in `token_loader`. Raises DataError where there is nothing to predict.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise DataError(
            f"nothing to predict in {count_of(len(tokens), 'token')}; use more validation text"
        )
    for first in range(0, targets, rows * sequence_length):
        # One id more than inputs: it is the target of the last one.
        ids = tokens[first : first + rows * sequence_length + 1].astype(np.int64)
        # Windows overlap by one token, so that the first of each is a target too.
        # Padding of the inputs may be any id, because its targets are IGNORE.
        inputs = _windowed(ids[:-1], sequence_length, 0)
        batch = Batch(inputs, _windowed(ids[1:], sequence_length, IGNORE))
        if documents is not None:
            # Segments are those of the inputs, which are one fewer than the ids.
            segments = documents.segments(first, first + len(ids) - 1)
            batch = replace(batch, segments=_windowed(segments, sequence_length, -1))
        yield batch


def _windowed(values: np.ndarray, sequence_length: int, fill: int) -> Tensor:
    """Consecutive rows of `sequence_length` values; the last row is padded with `fill`."""
    rows = np.full((-(-len(values) // sequence_length), sequence_length), fill, dtype=np.int64)
    rows.flat[: len(values)] = values
    return torch.from_numpy(rows)


def _sample(tokens: Tokens) -> str:
    """A digest of the first and the last tokens: cheap, and other data differ there."""
    digest = hashlib.blake2b(digest_size=8)
    for end in (tokens[:4096], tokens[max(0, len(tokens) - 4096) :]):
        # One width and byte order, so that the digest depends on neither shards nor machine.
        digest.update(end.astype("<i8").tobytes())
    return digest.hexdigest()


def _identity(examples: Sequence[Example], seed: int, sequence_length: int) -> dict[str, Any]:
    """Distinguishes these examples from others. Raises DataError for one without a target.

    The keys are those of cursors on disk, where an example is called a record.
    """
    short = sum(len(example.ids) < 2 for example in examples)
    if short or not examples:
        raise DataError(
            f"of {count_of(len(examples), 'example')} {short} with fewer than 2 tokens to learn "
            "from; leave those out, and give at least one"
        )
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        # With its length: the same ids divided into other examples are other data.
        digest.update(np.array([len(example.ids), *example.ids], dtype="<i8").tobytes())
        # The mask counts: the same ids with other targets are other data.
        digest.update(bytes(example.loss_mask))
    return {
        "seed": seed,
        "sequence_length": sequence_length,
        "records": len(examples),
        "sample": digest.hexdigest(),
    }
