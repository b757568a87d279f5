"""Loss of a model on a split: nats per token and bits per byte."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from openpalm.data.batches.loader import Batch, evaluation_batches
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.shards import Dataset
from openpalm.model.transformer import Transformer
from openpalm.train.objective import NextToken
from openpalm.train.probes import held_out_sums

TOKENS_AT_A_TIME = 8192
"""Tokens of a split in one forward pass."""


@dataclass(frozen=True)
class SplitLoss:
    """Sums over a whole split, or weighted sums over a mixture of splits."""

    nats: float
    tokens: float
    bytes: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits of all tokens, with end-of-text, per byte of text: comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes


def mixed_loss(losses: Sequence[SplitLoss], shares: Sequence[float]) -> SplitLoss:
    """The loss on a text with tokens from the splits in the proportion of `shares`."""
    rates = [share / loss.tokens for loss, share in zip(losses, shares, strict=True)]
    rated = list(zip(losses, rates, strict=True))
    return SplitLoss(
        sum(loss.nats * rate for loss, rate in rated),
        sum(shares),
        sum(loss.bytes * rate for loss, rate in rated),
    )


def split_loss(
    model: Transformer,
    batches: Iterable[Batch],
    text_bytes: int,
    dtype: torch.dtype = torch.float32,
) -> SplitLoss:
    """Sums the loss of `model` over batches that predict each token of a split once.

    `text_bytes` is the UTF-8 size of the split's text. Each window starts without context, so
    longer windows give a lower loss.
    """
    sums, tokens = held_out_sums(model, NextToken(), batches, dtype)
    return SplitLoss(sums.get("loss", 0.0), tokens, text_bytes)


def dataset_loss(
    model: Transformer,
    dataset: Dataset,
    split: str,
    sequence_length: int,
    dtype: torch.dtype,
    *,
    document_mask: bool = False,
) -> SplitLoss:
    """The loss of `model` over a whole split of a dataset, in windows of `sequence_length`."""
    batches = evaluation_batches(
        dataset.tokens(split),
        sequence_length=sequence_length,
        rows=max(1, TOKENS_AT_A_TIME // sequence_length),
        documents=Documents([dataset], split) if document_mask else None,
    )
    return split_loss(model, batches, dataset.manifest.splits[split].bytes, dtype)
