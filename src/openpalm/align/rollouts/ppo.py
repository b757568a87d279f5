"""Proximal policy optimisation of a language model (Schulman et al. 2017; Ziegler et al. 2019).

A critic V predicts, before each token of an answer, the reward still to come. The advantage of a
token is GAE (align.advantages), the policy's loss is clipped (align.policy), the critic's is

    max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2,  R = advantage + V_old

both averaged over tokens, their sum weighted by `--value-loss-coef`. Advantages are whitened over
the whole rollout, after R was made of them. The penalty for leaving the reference is part of the
reward, and its strength beta follows the KL that is wanted where `--target-kl` names one (Ziegler
et al. 2019, section 2.2): beta is multiplied by 1 + clip(KL / target - 1, -0.2, 0.2) answers /
`--kl-horizon` after each rollout.

With `--value-bins` the critic is a classifier trained on a Gaussian around R (HL-Gauss,
Farebrother et al. 2024), and its value the expected bin.
"""

import torch
from torch import Tensor

from openpalm.align.config import PpoSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.pairs.reward_model import gaussian_bins
from openpalm.align.rollouts.advantages import generalised_advantages, token_rewards, whitened
from openpalm.align.rollouts.policy_loss import as_sums, surrogate
from openpalm.align.rollouts.rollout_batch import Estimated, Rollout, RolloutBatch
from openpalm.model.critic import ActorCritic
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


class PpoObjective:
    """Sums policy and critic losses over the answers' tokens."""

    def __init__(self, settings: PpoSettings):
        self.settings = settings

    def count(self, batch: RolloutBatch, /) -> int:
        """Tokens of answers."""
        return int(batch.mask.sum())

    def loss(self, model: Transformer, batch: RolloutBatch, /) -> tuple[Tensor, Metrics]:
        assert isinstance(model, ActorCritic)
        now = evaluate(
            model,
            batch.inputs,
            batch.targets,
            temperature=self.settings.temperature,
            train_entropy=self.settings.entropy_coef > 0,
        )
        assert now.values is not None
        policy, means = surrogate(self.settings, now, batch)
        critic = critic_losses(model, now.values, batch, self.settings.value_clip)
        means["value_loss"] = critic.mean().item()
        total = policy.sum() + self.settings.value_loss_coef * critic.sum()
        return total, as_sums(means, self.count(batch))


def critic_losses(model: ActorCritic, read: Tensor, batch: RolloutBatch, clip: float) -> Tensor:
    """Of each token, [tokens]: clipped squares, or the cross entropy of a critic that has bins."""
    bins, returns, old = model.critic.bins, batch.returns[batch.mask], batch.values[batch.mask]
    if bins is not None:
        targets = gaussian_bins(returns.clamp(bins.low, bins.high), bins.centres(read.device))
        return -(targets * read.log_softmax(dim=-1)).sum(dim=-1)
    near = old + (read - old).clamp(-clip, clip)
    squares = (read - returns).square(), (near - returns).square()
    return torch.maximum(*squares) / 2


def estimate(settings: PpoSettings, rollout: Rollout, beta: float) -> Estimated:
    """GAE over rewards that carry the penalty; advantages whitened, returns not."""
    price = beta if settings.kl == "reward" else 0.0
    penalty = price * (rollout.old_log_probs - rollout.reference_log_probs)
    rewards = token_rewards(rollout.rewards, rollout.mask, penalty)
    advantages = generalised_advantages(
        rewards,
        rollout.values,
        rollout.mask,
        discount=settings.discount,
        decay=settings.gae_lambda,
    )
    returns = (advantages + rollout.values) * rollout.mask
    if settings.whiten_advantages:
        advantages = whitened(advantages, rollout.mask)
    return Estimated(advantages, returns)
