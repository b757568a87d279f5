"""How well a model predicts a split: nats a token and bits a byte of text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from openpalm.data.batches.loader import Batch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import NextToken


@dataclass(frozen=True)
class SplitLoss:
    """Sums over a whole split, or what a mixture of splits has in their place."""

    nats: float
    tokens: float
    bytes: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers: bits for all tokens, end markers too, per text byte."""
        return self.nats / math.log(2) / self.bytes


def mixed_loss(losses: Sequence[SplitLoss], shares: Sequence[float]) -> SplitLoss:
    """Of a text whose tokens are from the splits in the proportion of `shares`."""
    rates = [share / loss.tokens for loss, share in zip(losses, shares, strict=True)]
    rated = list(zip(losses, rates, strict=True))
    return SplitLoss(
        sum(loss.nats * rate for loss, rate in rated),
        sum(shares),
        sum(loss.bytes * rate for loss, rate in rated),
    )


@torch.no_grad()
def split_loss(
    model: Transformer,
    batches: Iterable[Batch],
    text_bytes: int,
    dtype: torch.dtype = torch.float32,
) -> SplitLoss:
    """Sums the loss of `model` over batches that predict each token of a split once.

    `text_bytes` is the UTF-8 size of the split's text. Each window starts without context, so a
    longer sequence length gives a lower figure.
    """
    objective = NextToken()
    model.eval()
    nats, tokens = 0.0, 0
    device = model.embedding.device
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = objective.loss(model, batch.to(device))
        nats += loss.item()
        tokens += objective.count(batch)
    return SplitLoss(nats, tokens, text_bytes)
