"""Vocabulary parallelism: embedding, head and cross entropy on a table with its rows shared out.

Each process has some rows of the table and computes their part of the embeddings and logits; the
normaliser of the softmax is a sum over processes (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from openpalm.model.cross_entropy import (
    computed_dtype,
    linear_cross_entropy,
    pieces,
    positions_per_chunk,
)
from openpalm.model.embedding_head import Embedding, ProjectHead
from openpalm.model.sharding import local_part, local_part_or_none
from openpalm.parallel.collectives import Group, joined, largest_part, shared, span, summed


class SharedEmbedding(Embedding):
    """Token ids [...] -> embeddings [..., dim], of a table with this process's rows."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return summed(self.terms(ids, table), self.group)

    def terms(self, ids: Tensor, table: Tensor) -> Tensor:
        """The embeddings of this process's rows, and zeros for other ids."""
        start, count = span(len(table), self.group)
        inside = (ids >= start) & (ids < start + count)
        found = F.embedding((ids - start).clamp(0, count - 1), local_part(table))
        return found.masked_fill(~inside[..., None], 0.0)


class SharedHead(ProjectHead):
    """Whole logits, or their cross entropy, from whole states and this process's rows."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(self._shared(states), local_part(table), local_part_or_none(bias))
        return joined(logits, len(table), -1, self.group)

    def cross_entropy(
        self,
        states: Tensor,
        table: Tensor,
        bias: Tensor | None,
        size: int,
        targets: Tensor,
        z_loss: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        start, count = span(len(table), self.group)
        losses = _Losses(self.group, start, min(max(size - start, 0), count))
        # All processes must take the same chunks, whatever their parts of an uneven table.
        chunk = chunk or positions_per_chunk(states, largest_part(len(table), self.group))
        return linear_cross_entropy(
            self._shared(states),
            local_part(table),
            local_part_or_none(bias),
            targets,
            z_loss=z_loss,
            chunk=chunk,
            losses=losses,
        )

    def _shared(self, states: Tensor) -> Tensor:
        return shared(states.to(computed_dtype(states)), self.group)


@dataclass(frozen=True)
class _Losses:
    """The Losses of logits of some ids, see cross_entropy.Losses: two all-reduces."""

    group: Group
    start: int
    """first id of this process"""
    real: int
    """number of its ids; further columns of the logits are padding"""

    def __call__(
        self, logits: Tensor, targets: Tensor, z_loss: float, wide: torch.dtype, wanted: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        logits[:, self.real :] = -torch.inf
        index = targets - self.start
        inside = (index >= 0) & (index < self.real)
        index = index.clamp(0, logits.shape[1] - 1)[:, None]
        log_z, of_target = self._statistics(logits, index, inside, wide)
        if wanted:
            for piece in pieces(logits):
                # In place: no further tensor of the size of the piece is needed.
                share = logits[piece].to(wide, copy=True).sub_(log_z[piece, None]).exp_()
                if z_loss:
                    share *= 1 + 2 * z_loss * log_z[piece, None]
                share.scatter_add_(1, index[piece], -inside[piece, None].to(wide))
                logits[piece].copy_(share)
        yield (log_z - of_target).sum(), z_loss * log_z.square().sum()

    def _statistics(
        self, logits: Tensor, index: Tensor, inside: Tensor, wide: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """log Z and the target's logit of each position, over the whole vocabulary."""
        highest = logits.amax(dim=-1).to(wide)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        totals = [
            logits[piece].to(wide, copy=True).sub_(highest[piece, None]).exp_().sum(dim=-1)
            for piece in pieces(logits)
        ]
        of_target = logits.gather(1, index)[:, 0].to(wide).masked_fill(~inside, 0.0)
        sums = torch.stack([torch.cat(totals), of_target])
        dist.all_reduce(sums, group=self.group)
        return highest + sums[0].log(), sums[1]
