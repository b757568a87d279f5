"""Direct preference optimisation (DPO, Rafailov et al. 2023) and related losses on pairs.

For a prompt x with a chosen completion w and a rejected completion l, DPO reads the policy itself
as a reward model: r(y) = beta log(pi(y|x) / ref(y|x)) is its implicit reward (their equation 5).
The loss is Bradley and Terry's, P(w is preferred) = sigmoid(r_w - r_l), so no reward model and no
sampling are needed:

    dpo    -log s(r_w - r_l)                                     Rafailov et al. 2023, eq. 7
    cdpo   -(1 - e) log s(r_w - r_l) - e log s(r_l - r_w)        Mitchell 2023: label noise e
    ipo    ((r_w - r_l) / beta - 1 / (2 beta))^2                 Azar et al. 2023, eq. 17
    simpo  -log s(b/|w| log pi(w) - b/|l| log pi(l) - margin)    Meng et al. 2024, eq. 6
    orpo   -log pi(w)/|w| - beta log s(odds(w) - odds(l))        Hong et al. 2024, eq. 6 and 7

s is the sigmoid, b is beta, |y| the number of tokens, odds(y) = log(p / (1 - p)) for
p = pi(y)^(1/|y|). log pi(y) sums over the completion's tokens, its end marker included: a model
that did not learn where to stop would otherwise go unpunished.

Departures. The reference's log-probabilities are columns of the batch, computed once before the
run (align/pairs/examples.py); simpo and orpo use none. `length_normalise` divides log pi and log
ref by |y| in the first three losses too: long completions have large log-ratios, and without it a
model can win pairs by length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import lengths
from openpalm.align.pairs.examples import PreferenceBatch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics

_MIN_COMPLEMENT = 1e-6
"""The least 1 - p for which the odds still follow p; see _log_odds."""


class PairObjective:
    """Sums one of these losses over pairs."""

    def __init__(self, settings: DpoSettings):
        self.settings = settings

    def count(self, batch: PreferenceBatch, /) -> int:
        """Pairs."""
        return len(batch)

    def loss(self, model: Transformer, batch: PreferenceBatch, /) -> tuple[Tensor, Metrics]:
        log_probs = batch.log_probs(model).sum(dim=-1)
        tokens = lengths(batch.targets)
        losses, rewards = pair_losses(self.settings, log_probs, tokens, batch.reference)
        chosen, rejected = rewards.detach().chunk(2)
        metrics = {
            "accuracy": (chosen > rejected).float().sum().item(),
            "reward_margin": (chosen - rejected).sum().item(),
            "reward_chosen": chosen.sum().item(),
            "reward_rejected": rejected.sum().item(),
            "log_prob_chosen": log_probs.detach().chunk(2)[0].sum().item(),
        }
        return losses.sum(), metrics


def pair_losses(
    settings: DpoSettings, log_probs: Tensor, tokens: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [pairs] and implicit rewards [2 pairs], the chosen half first.

    log_probs: log pi of whole completions, [2 pairs]; tokens: their lengths; reference: log ref,
    zeros for the losses without a reference.
    """
    beta = settings.resolved_beta
    if settings.loss in ("simpo", "orpo") or settings.length_normalise:
        log_probs, reference = log_probs / tokens, reference / tokens
    rewards = beta * (log_probs - reference)
    chosen, rejected = rewards.chunk(2)
    difference = chosen - rejected
    if settings.loss == "dpo":
        losses = -F.logsigmoid(difference)
    elif settings.loss == "cdpo":
        noise = settings.label_smoothing
        losses = -(1 - noise) * F.logsigmoid(difference) - noise * F.logsigmoid(-difference)
    elif settings.loss == "ipo":
        losses = (difference / beta - 1 / (2 * beta)).square()
    elif settings.loss == "simpo":
        losses = -F.logsigmoid(difference - settings.margin)
    else:
        odds_chosen, odds_rejected = _log_odds(log_probs).chunk(2)
        losses = -log_probs.chunk(2)[0] - beta * F.logsigmoid(odds_chosen - odds_rejected)
    return losses, rewards


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, exact for p near 1 too.

    Where p rounds to 1 in float32 the odds are infinite and their gradient is not a number.
    Therefore the odds are constant below 1 - p = 1e-6; there only the likelihood term of the loss
    still has a gradient.
    """
    log_p = log_p.clamp_max(-_MIN_COMPLEMENT)
    return log_p - torch.log(-torch.expm1(log_p))
