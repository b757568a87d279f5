"""The only per-token log-probability function: every alignment objective reads its numbers here.

Position t of `inputs` predicts `targets[t]`, which is the token after it: the shift is made once,
where a batch is built, and nowhere again. A target of IGNORE (prompt, padding) has no probability
and contributes exactly zero, to the sum and to the gradient; the end marker is a target like any
other, so that the probabilities of all answers sum to one.
"""

import torch.nn.functional as F
from torch import Tensor

from openpalm.data.loader import IGNORE
from openpalm.model.transformer import Transformer


def token_log_probs(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Natural log of the probability of each target, 0 where it is IGNORE.

    inputs, targets: int64 [rows, time]; returns float32 [rows, time].
    """
    logits = model.logits(inputs)
    nats = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -nats.view_as(targets)


def lengths(targets: Tensor) -> Tensor:
    """Targets that count, of each row: [rows]."""
    return (targets != IGNORE).sum(dim=-1)
