"""Group-relative policy optimisation (Shao et al. 2024) and its kin: no critic, a group instead.

Several answers are drawn to each prompt, and each is measured against the others:
align.advantages.group_advantages. What differs besides is over what the tokens' losses average:

    grpo     mean over each answer's tokens, then over answers: long wrong answers cost less
    dr-grpo  sum over the tokens / the longest an answer may be, mean over answers (Liu et al. 2025)
    dapo     mean over all tokens (Yu et al. 2025), a higher upper clip, and prompts whose answers
             all have the same reward drawn anew (their "dynamic sampling")
    rloo     sum over the tokens, mean over answers: REINFORCE (Ahmadian et al. 2024)

Our departure from the papers: the distance to the reference is taken from the reward by default,
see align.policy for why; `--kl k3` is as GRPO was published.
"""

import torch
from torch import Tensor

from openpalm.align.config import GroupAdvantage, GrpoSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.advantages import group_advantages
from openpalm.align.rollouts.policy_loss import as_sums, surrogate
from openpalm.align.rollouts.rollout_batch import Estimated, Rollout, RolloutBatch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


class GroupObjective:
    """Sums the clipped loss over answers, or over tokens where the average is over those."""

    def __init__(self, settings: GrpoSettings):
        self.settings = settings

    def count(self, batch: RolloutBatch, /) -> int:
        """Tokens for dapo, else answers."""
        if self.settings.advantage == "dapo":
            return int(batch.mask.sum())
        return len(batch.targets)

    def loss(self, model: Transformer, batch: RolloutBatch, /) -> tuple[Tensor, Metrics]:
        now = evaluate(
            model,
            batch.inputs,
            batch.targets,
            batch.layout,
            batch.reads,
            temperature=self.settings.temperature,
            train_entropy=self.settings.entropy_coef > 0,
        )
        losses, means = surrogate(self.settings, now, batch)
        weights = token_weights(batch.mask, self.settings.advantage, self.settings.max_new_tokens)
        return (losses * weights).sum(), as_sums(means, self.count(batch))


def token_weights(mask: Tensor, kind: GroupAdvantage, max_new_tokens: int) -> Tensor:
    """What each token's loss counts, [rows, 1]."""
    if kind == "grpo":
        return 1 / mask.sum(dim=-1, keepdim=True)
    share = 1 / max_new_tokens if kind == "dr-grpo" else 1.0
    return torch.full((len(mask), 1), share, device=mask.device)


def estimate(settings: GrpoSettings, rollout: Rollout, beta: float) -> Estimated:
    """The same advantage for every token of an answer."""
    penalty = None
    if settings.kl == "reward":
        penalty = beta * (rollout.old_log_probs - rollout.reference_log_probs).sum(dim=-1)
    each = group_advantages(rollout.rewards, settings.num_completions, settings.advantage, penalty)
    advantages = each[:, None] * rollout.mask
    return Estimated(advantages, torch.zeros_like(advantages))
