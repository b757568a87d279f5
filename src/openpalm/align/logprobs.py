"""Per-token log-probabilities (log_probs), entropy and values: the one function for all objectives.

Position t of `inputs` predicts `targets[t]`, the token after it: batches are built with this shift,
and no other code shifts. A target of IGNORE (prompt, padding) contributes exactly zero to the sum
and to the gradient. The end marker is a target like any other, so the probabilities of all
completions sum to one. Only the states that predict a target are computed after the last attention:
with a large vocabulary, logits take most of the memory.

Dropout is off in every pass. With dropout two passes differ, so the probability ratio of an
unchanged policy would not be 1, and its KL to the reference not 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.data.batches.loader import IGNORE
from openpalm.model.critic import ActorCritic
from openpalm.model.layout import Layout
from openpalm.model.transformer import Transformer


def token_log_probs(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    layout: Layout | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """Log-probability of each target in nats, 0 where it is IGNORE; float32, shape of `targets`.

    inputs, targets: int64 [rows, time]. Rows with several completions
    (align/pairs/shared_prompt.py) have a `layout`; their targets are [completions, tokens], and
    `reads`, of that shape, is the place in the flattened `inputs` that predicts each target.
    """
    counts = targets != IGNORE
    logits = model.head(_residual(model, inputs, counts, layout, reads))
    return _spread(counts, _log_probs(logits, targets[counts]))


def _residual(
    model: Transformer,
    inputs: Tensor,
    counts: Tensor,
    layout: Layout | None,
    reads: Tensor | None,
) -> Tensor:
    """The states [n, dim] that predict the targets; leaves the model in eval mode.

    It must stay in eval mode through backward, which may recompute blocks. A loop that wants
    dropout calls train() before each step, as THE loop does.
    """
    places = counts.flatten().nonzero()[:, 0] if reads is None else reads[counts]
    return model.eval().residual(inputs, layout=layout, selected=places)


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


def _spread(counts: Tensor, values: Tensor) -> Tensor:
    """The values in order where `counts` [rows, time] is True, and zeros elsewhere."""
    return torch.zeros(counts.shape, device=values.device).masked_scatter(counts, values)


def lengths(targets: Tensor) -> Tensor:
    """Number of targets in each row, [rows]."""
    return (targets != IGNORE).sum(dim=-1)


class Evaluated(NamedTuple):
    """A policy's statistics of given completions; all [rows, time], 0 outside of completions."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    """the critic's value before each completion token: [tokens], or [tokens, bins]"""


def evaluate(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    layout: Layout | None = None,
    reads: Tensor | None = None,
    *,
    temperature: float = 1.0,
    train_entropy: bool = False,
) -> Evaluated:
    """Log-probabilities and entropy of softmax(logits / temperature), and values, in one pass.

    Rows may hold several completions as in `token_log_probs`, unless the model has a critic.
    """
    counts = targets != IGNORE
    residual = _residual(model, inputs, counts, layout, reads)
    logits = model.head(residual) / temperature
    entropy = entropies(logits if train_entropy else logits.detach())
    values = None
    if isinstance(model, ActorCritic):
        values = model.values(inputs, residual, counts)
    log_probs = _log_probs(logits, targets[counts])
    return Evaluated(_spread(counts, log_probs), _spread(counts, entropy), values)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each distribution in nats, [...] from logits [..., vocab]."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
