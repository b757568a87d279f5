"""The clipped policy gradient that PPO, GRPO and their kin share, and the penalties that hold them.

With ratio_t = pi(y_t) / pi_old(y_t) and advantage A_t a token's loss is

    - min(ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t)      Schulman et al. 2017, equation 7

(a larger `high` is DAPO's, Yu et al. 2025). Where the sampler was not exactly pi_old, such as a
quantised one, the loss is weighted by min(pi_old / sampler, cap), truncated importance sampling
(Ionides 2008).

Three ways to stay near the reference, with d_t = log pi(y_t) - log ref(y_t):

    reward  beta d_t is taken from the reward of every token (Ziegler et al. 2019): its policy
            gradient is the gradient of KL(pi || ref), exactly. The default.
    k2      (sum_t d_t)^2 / 2 added to the loss: on fresh answers the same gradient in expectation.
    k3      sum_t exp(-d_t) - 1 + d_t added to the loss, as GRPO was published (Schulman 2020; Shao
            et al. 2024, equation 4). Its value is unbiased, its gradient is not: it is that of
            KL(ref || pi), token by token. There for those who repeat papers.
"""

import torch
from torch import Tensor

from openpalm.align.config import RolloutSettings
from openpalm.align.logprobs import Evaluated
from openpalm.align.rollouts.rollout_batch import RolloutBatch
from openpalm.train.objective import Metrics


def surrogate(
    settings: RolloutSettings, now: Evaluated, batch: RolloutBatch
) -> tuple[Tensor, Metrics]:
    """Each token's loss [rows, time], 0 outside of the answers, and means over the tokens."""
    mask = batch.mask
    # One step a rollout: the policy is still the one that answered, whatever rounds otherwise.
    old = now.log_probs.detach() if settings.one_step else batch.old_log_probs
    ratio = (now.log_probs - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.highest_clip)
    gained = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    losses = -gained * batch.importance_weights - settings.entropy_coef * now.entropy
    if settings.kl in ("k2", "k3"):
        difference = (now.log_probs - batch.reference_log_probs) * mask
        losses = losses + settings.kl_coef * _PENALTIES[settings.kl](difference)
    with torch.no_grad():
        metrics = {
            "ratio": mean(ratio, mask),
            "clip_fraction": mean((ratio != clipped).float(), mask),
            "entropy": mean(now.entropy, mask),
            "approx_kl": mean(old - now.log_probs, mask),
            "importance_weight": mean(batch.importance_weights, mask),
        }
    return losses * mask, metrics


def k2(difference: Tensor) -> Tensor:
    """Per token; the sum over an answer is (sum_t d_t)^2 / 2."""
    return 0.5 * difference * difference.sum(dim=-1, keepdim=True)


def k3(difference: Tensor) -> Tensor:
    return (-difference).exp() - 1 + difference


_PENALTIES = {"k2": k2, "k3": k3}


def mean(values: Tensor, mask: Tensor) -> float:
    """Over the mask."""
    return (values * mask).sum().item() / max(1, int(mask.sum()))


def as_sums(means: Metrics, count: int) -> Metrics:
    """Means as what an objective reports: sums that the trainer divides by its count."""
    return {name: value * count for name, value in means.items()}
