"""Direct preference optimisation (Rafailov et al. 2023) and its kin: losses on pairs of answers.

For a prompt x with a chosen answer w and a rejected one l, the policy's implicit reward is
r(y) = beta log(pi(y|x) / ref(y|x)) (their equation 5), and the loss asks that r(w) > r(l):

    dpo    -log s(r_w - r_l)                                     Rafailov et al. 2023, eq. 7
    cdpo   -(1 - e) log s(r_w - r_l) - e log s(r_l - r_w)        Mitchell 2023: labels wrong with e
    ipo    ((r_w - r_l) / beta - 1 / (2 beta))^2                 Azar et al. 2023, eq. 17
    simpo  -log s(b/|w| log pi(w) - b/|l| log pi(l) - margin)    Meng et al. 2024, eq. 6
    orpo   -log pi(w)/|w| - beta log s(odds(w) - odds(l))        Hong et al. 2024, eq. 6 and 7

where s is the logistic function and odds(y) = log(p / (1 - p)) for p = pi(y)^(1/|y|). The sums run
over the answer's tokens, its end marker included. The reference's log-probabilities are columns of
the batch, computed once before the run: an objective owns no second model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import lengths
from openpalm.align.pairs.examples import PairBatch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics

_LEAST_DOUBT = 1e-6


class PairObjective:
    """Sums one of these losses over pairs."""

    def __init__(self, settings: DpoSettings):
        self.settings = settings

    def count(self, batch: PairBatch, /) -> int:
        """Pairs."""
        return batch.pairs

    def loss(self, model: Transformer, batch: PairBatch, /) -> tuple[Tensor, Metrics]:
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
    """Losses [pairs] and implicit rewards [2 pairs], the chosen answers' half first.

    log_probs: of whole answers, [2 pairs]; tokens: their lengths; reference: what the reference
    gave them, zeros for the losses that need none.
    """
    beta = settings.strength
    if settings.loss in ("simpo", "orpo") or settings.length_normalise:
        log_probs, reference = log_probs / tokens, reference / tokens
    rewards = beta * (log_probs - reference)
    chosen, rejected = rewards.chunk(2)
    difference = chosen - rejected
    if settings.loss == "dpo":
        losses = -F.logsigmoid(difference)
    elif settings.loss == "cdpo":
        wrong = settings.label_smoothing
        losses = -(1 - wrong) * F.logsigmoid(difference) - wrong * F.logsigmoid(-difference)
    elif settings.loss == "ipo":
        losses = (difference / beta - 1 / (2 * beta)).square()
    elif settings.loss == "simpo":
        losses = -F.logsigmoid(difference - settings.margin)
    else:
        better, worse = _log_odds(log_probs).chunk(2)
        losses = -log_probs.chunk(2)[0] - beta * F.logsigmoid(better - worse)
    return losses, rewards


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, exact for p near one too.

    Where p is one in float32 the odds are infinite and their gradient is not a number: from
    1 - p = 1e-6 on they are constant, and only the loss's first term still moves such an answer.
    """
    log_p = log_p.clamp_max(-_LEAST_DOUBT)
    return log_p - torch.log(-torch.expm1(log_p))
