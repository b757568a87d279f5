"""Kullback-Leibler (KL) divergence from the reference policy: estimators, penalties, coefficient.

RL on a language model maximises E[reward] - kl_coef KL(pi || ref) (Ziegler et al. 2019, eq. 2).
KL(pi || ref) is a sum over all completions. With d_t = log pi(y_t) - log ref(y_t) of sampled tokens
y ~ pi it is estimated token by token (Schulman 2020, "Approximating KL Divergence"):

    k1   d                  unbiased, with a large variance; one sample can be negative
    k2   d^2 / 2            biased, with a small variance; never negative
    k3   exp(-d) - 1 + d    unbiased, with a small variance; never negative

An unbiased value does not imply an unbiased gradient, so the place of the penalty matters. --kl has
three choices:

    reward   kl_coef k1 is subtracted from the reward of every token. The policy gradient of that
             reward is exactly the gradient of KL(pi || ref). The default.
    k2       kl_coef (sum_t d_t)^2 / 2 is added to the loss. This is k2 of the whole completion, not
             of each token: on fresh samples its gradient has the same expectation as `reward`.
    k3       kl_coef k3 is added to each token's loss, as GRPO was published (Shao et al. 2024,
             equation 4). Its gradient is that of KL(ref || pi), token by token; it is here to
             reproduce published results.
"""

from collections.abc import Callable

from torch import Tensor

from openpalm.align.config import RolloutSettings
from openpalm.align.rollouts.rollout_batch import Rollout

MAX_KL_ERROR = 0.2
"""Relative error of the KL at which the adaptive coefficient is clipped (Ziegler et al. 2019)."""


def k1(difference: Tensor) -> Tensor:
    """Per token, from d [rows, time]."""
    return difference


def k2(difference: Tensor) -> Tensor:
    """Per token; the sum over a row is k2 of the whole completion, (sum_t d_t)^2 / 2."""
    return 0.5 * difference * difference.sum(dim=-1, keepdim=True)


def k3(difference: Tensor) -> Tensor:
    """Per token, from d [rows, time]."""
    return (-difference).exp() - 1 + difference


LOSS_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"k2": k2, "k3": k3}


def reward_penalty(settings: RolloutSettings, rollout: Rollout, kl_coef: float) -> Tensor:
    """Subtracted from each token's reward, [rows, time]; zero where the loss has the penalty."""
    return _in_reward(settings, kl_coef) * k1(rollout.old_log_probs - rollout.reference_log_probs)


def completion_penalty(settings: RolloutSettings, rollout: Rollout, kl_coef: float) -> Tensor:
    """The sum of `reward_penalty` over each completion, [rows]."""
    kl = completion_kl(rollout.old_log_probs, rollout.reference_log_probs)
    return _in_reward(settings, kl_coef) * kl


def _in_reward(settings: RolloutSettings, kl_coef: float) -> float:
    return kl_coef if settings.kl == "reward" else 0.0


def loss_penalty(
    settings: RolloutSettings, log_probs: Tensor, reference: Tensor, mask: Tensor
) -> Tensor | float:
    """Added to each token's loss, [rows, time]; zero where the reward has the penalty.

    log_probs: of the current policy, with a gradient. mask: True on the completions' tokens.
    """
    if settings.kl not in LOSS_PENALTIES:
        return 0.0
    difference = (log_probs - reference) * mask
    return settings.kl_coef * LOSS_PENALTIES[settings.kl](difference)


def completion_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """k1 of each completion, [rows], in nats; both [rows, time] and 0 outside of completions."""
    return k1(log_probs - reference).sum(dim=-1)


def adapted_coefficient(
    kl_coef: float, kl: float, completions: int, settings: RolloutSettings
) -> float:
    """The KL coefficient after a rollout with this mean KL (Ziegler et al. 2019, section 2.2).

    It is multiplied by 1 + clip(KL / target - 1, -0.2, 0.2) completions / horizon, where the last
    factor is the paper's K_beta. Without --target-kl the coefficient is constant.
    """
    if settings.target_kl is None:
        return kl_coef
    error = max(-MAX_KL_ERROR, min(MAX_KL_ERROR, kl / settings.target_kl - 1))
    return kl_coef * (1 + error * completions / settings.kl_horizon)
