"""Token embedding and output head (unembedding) of a Transformer, as replaceable modules.

The Transformer owns the tables and passes them in, because a tied model uses one table for both
and checkpoints store it under one name. Quantized or sharded versions replace these modules.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.cross_entropy import linear_cross_entropy


class Embedding(nn.Module):
    """Token ids [...] -> embeddings [..., dim]; table: [padded vocabulary, dim]."""

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table)


class ProjectHead(nn.Module):
    """States [..., dim] -> logits [..., padded vocabulary], and their cross entropy."""

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(states, table, bias)

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
        """Summed cross entropy and z-loss of the first `size` logits, see linear_cross_entropy."""
        if len(table) > size:  # only then, because the gradient of a slice copies the whole table
            table, bias = table[:size], None if bias is None else bias[:size]
        return linear_cross_entropy(states, table, bias, targets, z_loss=z_loss, chunk=chunk)
