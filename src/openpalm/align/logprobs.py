"""The only per-token log-probability function: every alignment objective reads its numbers here.

Position t of `inputs` predicts `targets[t]`, which is the token after it: the shift is made once,
where a batch is built, and nowhere again. A target of IGNORE (prompt, padding) has no probability
and contributes exactly zero, to the sum and to the gradient; the end marker is a target like any
other, so that the probabilities of all answers sum to one. Only states that predict a target are
computed after the last attention: with a large vocabulary logits are most of a prompt's memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.data.loader import IGNORE
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

    inputs, targets: int64 [rows, time]. Where rows hold several answers (align/shared.py), with
    their `layout`, targets are [answers, tokens] and `reads`, of that shape, is the place in
    `inputs`, flattened, that predicts each.
    """
    counts = targets != IGNORE
    places = counts.flatten().nonzero()[:, 0] if reads is None else reads[counts]
    logits = model.head(model.residual(inputs, layout=layout, places=places))
    nats = F.cross_entropy(logits, targets[counts], reduction="none")
    return torch.zeros(targets.shape, device=nats.device).masked_scatter(counts, -nats)


def lengths(targets: Tensor) -> Tensor:
    """Targets that count, of each row: [rows]."""
    return (targets != IGNORE).sum(dim=-1)
