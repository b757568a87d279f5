"""The only per-token log-probability function: every alignment objective reads its numbers here.

Position t of `inputs` predicts `targets[t]`, which is the token after it: the shift is made once,
where a batch is built, and nowhere again. A target of IGNORE (prompt, padding) has no probability
and contributes exactly zero, to the sum and to the gradient; the end marker is a target like any
other, so that the probabilities of all answers sum to one. Only states that predict a target are
computed after the last attention: with a large vocabulary logits are most of a prompt's memory.

Dropout is off in every pass: two passes would differ with it, so that an unchanged policy would be
no ratio of one from the policy that answered, and not at its reference.
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
    """Natural log of the probability of each target, 0 where it is IGNORE; float32, its shape.

    inputs, targets: int64 [rows, time]. Where rows hold several answers
    (align/pairs/shared_prompt.py), with their `layout`, targets are [answers, tokens] and `reads`,
    of that shape, is the place in `inputs`, flattened, that predicts each.
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
    """The states [n, dim] that predict the targets that count; leaves the model in eval mode.

    It stays so through backward, which may compute blocks anew; a loop that wants dropout says
    train() before its step, as THE loop does.
    """
    places = counts.flatten().nonzero()[:, 0] if reads is None else reads[counts]
    return model.eval().residual(inputs, layout=layout, selected=places)


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


def _spread(counts: Tensor, values: Tensor) -> Tensor:
    """The values where `counts` [rows, time] is True, in its order, and zeros elsewhere."""
    return torch.zeros(counts.shape, device=values.device).masked_scatter(counts, values)


def lengths(targets: Tensor) -> Tensor:
    """Targets that count, of each row: [rows]."""
    return (targets != IGNORE).sum(dim=-1)


class Evaluated(NamedTuple):
    """What a policy thinks of given answers; all [rows, time], 0 outside of them."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    """what a critic read before each of those tokens: [tokens], or [tokens, bins]"""


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
    """The policy softmax(logits / temperature) and its critic, in one pass.

    Rows may hold several answers as for `token_log_probs`, unless there is a critic.
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
    """Nats of each distribution: [...] from logits [..., vocab]."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
