"""Group relative policy optimisation (GRPO, Shao et al. 2024), Dr. GRPO, DAPO and RLOO: no critic.

Several completions of each prompt are sampled, and a completion's advantage is its reward relative
to the others (advantages.group_advantages). The variants also differ in how the losses of tokens
(policy_loss.py) are averaged:

    grpo     mean over a completion's tokens, then over completions: wrong long completions cost
             less per token than wrong short ones
    dr-grpo  sum over the tokens / --max-new-tokens, mean over completions (Liu et al. 2025)
    dapo     mean over all tokens (Yu et al. 2025); also a higher upper clip, and prompts with equal
             rewards are replaced ("dynamic sampling", --max-resamples)
    rloo     sum over the tokens, mean over completions: REINFORCE (Ahmadian et al. 2024)

Departure from the papers: the KL penalty is part of the reward by default, because only then its
gradient is that of the KL (kl.py); `--kl k3` is GRPO as published.
"""

import torch
from torch import Tensor

from openpalm.align.config import GroupAdvantage, GrpoSettings
from openpalm.align.rollouts.advantages import group_advantages
from openpalm.align.rollouts.kl import completion_penalty
from openpalm.align.rollouts.policy_loss import as_sums, evaluate_batch, surrogate
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate, Rollout, RolloutBatch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


class GroupObjective:
    """Sums the clipped loss, weighted so that dividing by `count` gives the variant's average."""

    def __init__(self, settings: GrpoSettings):
        self.settings = settings

    def count(self, batch: RolloutBatch, /) -> int:
        """Tokens for dapo, else completions."""
        if self.settings.advantage == "dapo":
            return int(batch.mask.sum())
        return len(batch.targets)

    def loss(self, model: Transformer, batch: RolloutBatch, /) -> tuple[Tensor, Metrics]:
        now = evaluate_batch(self.settings, model, batch)
        losses, means = surrogate(self.settings, now, batch)
        weights = token_weights(batch.mask, self.settings.advantage, self.settings.max_new_tokens)
        return (losses * weights).sum(), as_sums(means, self.count(batch))


def token_weights(mask: Tensor, kind: GroupAdvantage, max_new_tokens: int) -> Tensor:
    """Weight of each token's loss within its completion, [rows, 1]."""
    if kind == "grpo":
        # A completion weighs the same whatever its length, so its tokens weigh less if it is long.
        return 1 / mask.sum(dim=-1, keepdim=True)
    # dr-grpo divides by a constant, so that a token weighs the same in short and long completions.
    weight = 1 / max_new_tokens if kind == "dr-grpo" else 1.0
    return torch.full((len(mask), 1), weight, device=mask.device)


def estimate(settings: GrpoSettings, rollout: Rollout, kl_coef: float) -> AdvantageEstimate:
    """Group advantages; every token of a completion has the same one. There are no returns."""
    # Rewards are of whole completions, so the penalty is summed over each as well.
    penalty = completion_penalty(settings, rollout, kl_coef)
    each = group_advantages(rollout.rewards, settings.num_completions, settings.advantage, penalty)
    advantages = each[:, None] * rollout.mask
    return AdvantageEstimate(advantages, torch.zeros_like(advantages))
