"""Proximal policy optimisation (PPO, Schulman et al. 2017) of a language model with a critic.

After Ziegler et al. 2019: a critic V predicts, before each token of a completion, the reward that
is still to come. A token's advantage is GAE (advantages.py) and the policy's loss is clipped
(policy_loss.py). The loss of the critic is clipped as well, with R = advantage + V_old:

    max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

The total is policy loss + `--value-loss-coef` x value loss, both averaged over tokens. Advantages
are whitened over the whole rollout, after R was computed from them. The KL penalty is part of each
token's reward, and `--target-kl` adapts its coefficient (kl.py).

Departure from the papers: with `--value-bins` the critic is a classifier, trained on a Gaussian
around R (HL-Gauss, Farebrother et al. 2024); its value is the expected bin.
"""

import torch
from torch import Tensor

from openpalm.align.config import PpoSettings
from openpalm.align.pairs.reward_model import gaussian_bins
from openpalm.align.rollouts.advantages import generalised_advantages, token_rewards, whitened
from openpalm.align.rollouts.kl import reward_penalty
from openpalm.align.rollouts.policy_loss import as_sums, evaluate_batch, surrogate
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate, Rollout, RolloutBatch
from openpalm.model.critic import ActorCritic
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


class PpoObjective:
    """Sums the policy's and the critic's losses over the completions' tokens."""

    def __init__(self, settings: PpoSettings):
        self.settings = settings

    def count(self, batch: RolloutBatch, /) -> int:
        """Tokens of completions."""
        return int(batch.mask.sum())

    def loss(self, model: Transformer, batch: RolloutBatch, /) -> tuple[Tensor, Metrics]:
        assert isinstance(model, ActorCritic)
        now = evaluate_batch(self.settings, model, batch)
        assert now.values is not None
        policy, means = surrogate(self.settings, now, batch)
        value = value_losses(model, now.values, batch, self.settings.value_clip)
        means["value_loss"] = value.mean().item()
        total = policy.sum() + self.settings.value_loss_coef * value.sum()
        return total, as_sums(means, self.count(batch))


def value_losses(model: ActorCritic, read: Tensor, batch: RolloutBatch, clip: float) -> Tensor:
    """The critic's loss of each token: clipped squares, or cross entropy for a critic with bins.

    read: the critic's output, [tokens] or [tokens, bins]. Returns [tokens].
    """
    bins, returns, old = model.critic.bins, batch.returns[batch.mask], batch.values[batch.mask]
    if bins is not None:
        # A return outside of the range is learnt as the edge bin.
        targets = gaussian_bins(returns.clamp(bins.low, bins.high), bins.centres(read.device))
        return -(targets * read.log_softmax(dim=-1)).sum(dim=-1)
    near = old + (read - old).clamp(-clip, clip)
    # The maximum is pessimistic, as the policy's minimum: no gain from moving beyond the clip.
    squares = (read - returns).square(), (near - returns).square()
    return torch.maximum(*squares) / 2


def estimate(settings: PpoSettings, rollout: Rollout, kl_coef: float) -> AdvantageEstimate:
    """GAE over the penalised rewards. Advantages are whitened; returns keep the reward's scale."""
    # The KL penalty is paid token by token, so the critic learns to predict it too.
    penalty = reward_penalty(settings, rollout, kl_coef)
    rewards = token_rewards(rollout.rewards, rollout.mask, penalty)
    advantages = generalised_advantages(
        rewards,
        rollout.values,
        rollout.mask,
        discount=settings.discount,
        gae_lambda=settings.gae_lambda,
    )
    # From unwhitened advantages: the critic must predict rewards, not normalised values.
    returns = (advantages + rollout.values) * rollout.mask
    if settings.whiten_advantages:
        advantages = whitened(advantages, rollout.mask)
    return AdvantageEstimate(advantages, returns)
