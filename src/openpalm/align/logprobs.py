"""The only per-token log-probability function: every alignment objective reads its numbers here.

Position t of `inputs` predicts `targets[t]`, which is the token after it: the shift is made once,
where a batch is built, and nowhere again. A target of IGNORE (prompt, padding) has no probability
and contributes exactly zero, to the sum and to the gradient; the end marker is a target like any
other, so that the probabilities of all answers sum to one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.data.loader import IGNORE
from openpalm.model.heads import ActorCritic
from openpalm.model.transformer import Transformer


def token_log_probs(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Natural log of the probability of each target, 0 where it is IGNORE.

    inputs, targets: int64 [rows, time]; returns float32 [rows, time].
    """
    return log_probs_of(model.logits(inputs), targets)


def log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits [..., vocab] that are there already: targets' shape."""
    nats = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -nats.view_as(targets)


def lengths(targets: Tensor) -> Tensor:
    """Targets that count, of each row: [rows]."""
    return (targets != IGNORE).sum(dim=-1)


class Evaluated(NamedTuple):
    """What a policy thinks of given answers; all [rows, time], 0 outside of them."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    """of a model with a critic: [rows, time], or [rows, time, bins] of one that has bins"""


def evaluate(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    train_entropy: bool = False,
) -> Evaluated:
    """The policy softmax(logits / temperature) and its critic, in one pass, dropout off.

    With dropout on, two passes differ and the ratio of an unchanged policy would not be one.
    """
    model.eval()
    residual = model.residual(inputs)
    counted = targets != IGNORE
    logits = model.head(residual[counted]) / temperature
    log_probs = torch.zeros(targets.shape, device=targets.device)
    entropy = torch.zeros_like(log_probs)
    log_probs[counted] = log_probs_of(logits, targets[counted])
    entropy[counted] = entropies(logits if train_entropy else logits.detach())
    values = model.values(inputs, residual) if isinstance(model, ActorCritic) else None
    return Evaluated(log_probs, entropy, values)


def entropies(logits: Tensor) -> Tensor:
    """Nats of each distribution: [...] from logits [..., vocab]."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
