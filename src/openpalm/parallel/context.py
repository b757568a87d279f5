"""Context parallelism: several processes share every sequence, each with a part of its positions.

Attached to next-token prediction from outside: all processes of a group get the same rows, and each
computes its own positions. Attention gathers the keys and the values of the whole sequence, which
is cheap with one key head (multi-query attention); everything else needs no other position.

Causal attention costs more at later positions. So the positions are cut into 2n chunks, and process
r of n has chunks r and 2n - 1 - r (zigzag order, as in zhuzilin/ring-flash-attention): all
processes then have equal work.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.errors import SettingsError
from openpalm.model.attention import causal_attention
from openpalm.model.block import Attend
from openpalm.model.layout import (
    Layout,
    SequenceGroup,
    attend_groups,
    begins_and_positions,
    groups_by_length,
)
from openpalm.parallel.collectives import all_gather_single
from openpalm.parallel.world import World


@dataclass(frozen=True)
class ContextSplit:
    """Cuts the positions of rows into 2 x size chunks, of which this process computes two."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def chunks(self) -> int:
        return 2 * self.size

    @property
    def own(self) -> tuple[int, int]:
        """Numbers of this process's chunks."""
        return self.rank, self.chunks - 1 - self.rank

    def part(self, batch: Batch) -> Batch:
        """This process's positions of a batch, in the order of its chunks."""
        whole = self._padded(batch)
        segments = None if whole.segments is None else self._part(whole.segments)
        return Batch(self._part(whole.inputs), self._part(whole.targets), segments)

    def layout(self, batch: Batch) -> Layout:
        """Positions and attention of this process's `part` of a batch."""
        whole = self._padded(batch)
        time = whole.inputs.shape[1]
        places = self._part(torch.arange(time, device=whole.inputs.device)[None])[0]
        if whole.segments is None:
            return Layout(places, self._gathering(self._attend_chunks), longest=time)
        _, positions = begins_and_positions(whole.segments)
        groups = _document_groups(self._part(positions), places, time)
        return Layout(self._part(positions), self._gathering(attend_groups(groups)), longest=time)

    def _part(self, values: Tensor) -> Tensor:
        """The own chunks of values [rows, time, ...]: [rows, time / size, ...]."""
        chunks = values.chunk(self.chunks, dim=1)
        return torch.cat([chunks[n] for n in self.own], dim=1)

    def _padded(self, batch: Batch) -> Batch:
        """The batch with padding on the right, up to a width that the chunks divide."""
        missing = -batch.inputs.shape[1] % self.chunks
        if not missing:
            return batch
        segments = batch.segments
        return Batch(
            F.pad(batch.inputs, (0, missing)),
            F.pad(batch.targets, (0, missing), value=IGNORE),
            None if segments is None else F.pad(segments, (0, missing), value=-1),
        )

    def _gathering(self, attend: Attend) -> Attend:
        """`attend` over the keys and the values of all processes, in the sequence's order."""

        def over_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Together: one collective a layer in each direction.
            keys, values = _GatherSequence.apply(torch.stack([k, v]), self).unbind(0)
            return attend(layer, q, keys, values)

        return over_all

    def _attend_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of both chunks, each over the keys up to its end."""
        size = q.shape[1] // 2
        attended = [
            causal_attention(queries, k[:, : (n + 1) * size], v[:, : (n + 1) * size])
            for n, queries in zip(self.own, q.split(size, dim=1), strict=True)
        ]
        return torch.cat(attended, dim=1)


def check_length(world: World, sequence_length: int) -> None:
    """Raises SettingsError for a length that cannot be cut into equal chunks."""
    size = world.axes.context
    lower = sequence_length // (2 * size) * (2 * size)
    if size > 1 and lower != sequence_length:
        near = [length for length in (lower, lower + 2 * size) if length]
        raise SettingsError(
            f"--sequence-length {sequence_length}: must be a multiple of {2 * size} with "
            f"--parallel.context {size}; use {' or '.join(map(str, near))}"
        )


def context_split(world: World) -> ContextSplit | None:
    """How this process shares sequences with others; None if it computes them alone."""
    if world.mesh is None or world.axes.context == 1:
        return None
    axis = world.mesh["context"]
    return ContextSplit(axis.get_local_rank(), axis.size(), axis.get_group())


def _document_groups(within: Tensor, places: Tensor, time: int) -> list[SequenceGroup]:
    """Attention groups of this process's pieces of documents.

    within: int64 [rows, own time], the position of each token in its document; places: int64
    [own time], in the row; time: of whole rows, to which the keys' indices belong.
    """
    rows, own = within.shape
    begins = within == 0
    begins[:, 0] = begins[:, own // 2] = True  # where chunks begin, pieces of documents do
    first = begins.flatten().nonzero()[:, 0]
    lengths = first.diff(append=first.new_tensor([rows * own]))
    earlier = within.flatten()[first]
    rows_begin = torch.arange(rows, device=within.device) * time
    in_rows = (rows_begin[:, None] + places).flatten()
    whole = earlier == 0
    groups = [
        SequenceGroup(queries, inside, in_rows[queries])
        for queries, inside in groups_by_length(first[whole], lengths[whole])
    ]
    # A document that began before the chunk: at most one for each row and chunk. Their numbers of
    # keys differ, so each is a group of its own.
    pieces = torch.stack([first, in_rows[first], lengths, earlier], dim=1)[~whole]
    for start, place, length, before in pieces.tolist():
        queries = torch.arange(start, start + length, device=within.device)[None]
        keys = torch.arange(place - before, place + length, device=within.device)[None]
        groups.append(SequenceGroup(queries, torch.ones_like(queries, dtype=torch.bool), keys))
    return groups


class _GatherSequence(torch.autograd.Function):
    """Own positions [2, rows, own time, ...] of every process -> [2, rows, time, ...], in order.

    The gradient of a position is the sum over all processes. Each process gets the others' shares
    of its own positions (all-to-all: as many bytes as reduce-scatter) and adds them up in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: ContextSplit) -> Tensor:
        ctx.split = split
        gathered = x.new_empty(split.size * len(x), *x.shape[1:])
        all_gather_single(gathered, x.contiguous(), split.group)
        # [process, keys or values, rows, first or second chunk, chunk, ...]
        chunks = gathered.unflatten(0, (split.size, -1)).unflatten(3, (2, -1)).unbind(3)
        # First chunks are in the order of the processes, second chunks in the opposite order.
        ordered = torch.cat([chunks[0], chunks[1].flip(0)])
        return ordered.movedim(0, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        split: ContextSplit = ctx.split
        (grad,) = grad_outputs
        chunks = grad.unflatten(2, (split.chunks, -1)).movedim(2, 0)
        first, second = chunks[: split.size], chunks[split.size :].flip(0)
        shares = torch.cat([first, second], dim=3)  # [process, 2, rows, own time, ...]
        received = torch.empty_like(shares)
        dist.all_to_all_single(received, shares, group=split.group)
        wide = torch.promote_types(grad.dtype, torch.float32)
        return received.sum(0, dtype=wide).to(grad.dtype), None
