"""Generalised advantage estimation (GAE) and group advantages: from rewards to advantages.

PPO has a critic, and estimates the advantage of each token by GAE (Schulman et al. 2016). GRPO and
its variants have none, and compare the completions of one prompt (Shao et al. 2024).

Per-token tensors are [rows, time] with a mask that is True on a completion's tokens, the end marker
included. Whatever a tensor holds outside of the mask changes no result.
"""

import torch
from torch import Tensor

from openpalm.align.config import GroupAdvantage

_MIN_STD = 1e-6
"""Rewards within a group that differ by less count as equal: they teach nothing."""


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor) -> Tensor:
    """The reward [rows] on each completion's last token, minus a penalty [rows, time] on all.

    With kl_coef log(pi / ref) as the penalty this is the reward of Ziegler et al. 2019, equation 2.
    A completion that was cut off has its reward on its last token too.
    """
    # The last token is where the mask, counted from the right, is 1 for the first time.
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return rewards[:, None] * last - penalty * mask


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, gae_lambda: float
) -> Tensor:
    """GAE (Schulman et al. 2016, equation 16): A_t = sum_k (discount lambda)^k delta_{t+k}.

    delta_t = r_t + discount V_{t+1} - V_t. A completion is a whole episode: V after its last token
    is zero, so nothing is bootstrapped from behind the end.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    # Backwards, A_t = delta_t + discount lambda A_{t+1} costs one step per token.
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        value = torch.where(inside, values[:, t], 0.0)
        delta = rewards[:, t] + discount * next_value - value
        # Zero outside of the mask, so that padding and prompts cut the recursion.
        next_advantage = torch.where(inside, delta + discount * gae_lambda * next_advantage, 0.0)
        next_value = value
        advantages[:, t] = next_advantage
    return advantages


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 over the whole mask; zero outside of it."""
    inside = values[mask]
    std = inside.std(correction=0).clamp_min(_MIN_STD)
    return torch.where(mask, (values - inside.mean()) / std, 0.0)


def group_advantages(
    rewards: Tensor,
    num_completions: int,
    kind: GroupAdvantage,
    penalty: Tensor | None = None,
) -> Tensor:
    """Each reward minus its penalty, relative to the other completions of the same prompt: [rows].

    Rows are ordered by prompt, `num_completions` each.

        grpo     (r - mean) / std         Shao et al. 2024, section 4.1.2; dapo does the same
        dr-grpo  r - mean                 Liu et al. 2025: the std favours prompts that are easy
        rloo     r - mean of the others   Ahmadian et al. 2024, equation 6

    The mean is of rewards minus penalties. The std is of the rewards alone: otherwise the noise in
    the penalties of equally good completions would be scaled up to deviation 1. For the same reason
    a group of equal rewards is not divided, and its rewards contribute exactly zero.
    """
    groups = rewards.view(-1, num_completions)
    equal = zero_variance(rewards, num_completions)[:, None]
    centred = torch.where(equal, 0.0, groups - groups.mean(dim=1, keepdim=True))
    if penalty is not None:
        penalties = penalty.view(-1, num_completions)
        centred = centred - (penalties - penalties.mean(dim=1, keepdim=True))
    if kind == "rloo":
        # r - mean of the others = (r - mean of all) n / (n - 1)
        centred = centred * num_completions / (num_completions - 1)
    elif kind in ("grpo", "dapo"):
        centred = centred / torch.where(equal, 1.0, groups.std(dim=1, keepdim=True))
    return centred.flatten()


def zero_variance(rewards: Tensor, num_completions: int) -> Tensor:
    """True for prompts with equal rewards for all completions: [prompts]."""
    groups = rewards.view(-1, num_completions)
    return groups.amax(dim=1) - groups.amin(dim=1) < _MIN_STD


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 a constant one."""
    variance = returns[mask].var(correction=0)
    if variance < _MIN_STD**2:
        return 0.0
    return (1 - (returns - values)[mask].var(correction=0) / variance).item()
