"""From rewards to advantages: pure functions on tensors, each with its paper.

Everything per token is [rows, time] with a mask that is True on an answer's tokens, its end marker
included. What lies behind an answer, whatever it holds, changes nothing.
"""

import torch
from torch import Tensor

from openpalm.align.config import GroupAdvantage

_SMALLEST_DEVIATION = 1e-6
"""Rewards of a group that differ by less are equal: nothing can be learnt from them."""


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor) -> Tensor:
    """The reward [rows] on each answer's last token, less a penalty [rows, time] on every one.

    With beta log(pi / ref) as the penalty this is the reward of Ziegler et al. 2019, equation 2.
    An answer that was cut has its reward on its last token too.
    """
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return rewards[:, None] * last - penalty * mask


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, decay: float
) -> Tensor:
    """GAE (Schulman et al. 2016, equation 16): sum_k (discount decay)^k delta_{t+k}, in the answer.

    delta_t = r_t + discount V_{t+1} - V_t, where V is zero behind the answer's last token.
    """
    advantages = torch.zeros_like(rewards)
    following = following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        value = torch.where(inside, values[:, t], 0.0)
        delta = rewards[:, t] + discount * following_value - value
        following = torch.where(inside, delta + discount * decay * following, 0.0)
        following_value = value
        advantages[:, t] = following
    return advantages


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over all of the mask together; zero elsewhere."""
    counted = values[mask]
    deviation = counted.std(correction=0).clamp_min(_SMALLEST_DEVIATION)
    return torch.where(mask, (values - counted.mean()) / deviation, 0.0)


def group_advantages(
    rewards: Tensor, answers: int, kind: GroupAdvantage, penalty: Tensor | None = None
) -> Tensor:
    """Each reward, less its penalty, against those of the other answers to its prompt: [rows].

    Rows are prompt by prompt, `answers` of each.

        grpo     (r - mean) / std         Shao et al. 2024, section 4.1.2; dapo takes the same
        dr-grpo  r - mean                 Liu et al. 2025: the std favours prompts that are easy
        rloo     r - mean of the others   Ahmadian et al. 2024, equation 6

    mean is of both together; std is of the rewards alone, so that the noise in the penalties of
    equally good answers is not scaled up to deviation 1. In a group of equal rewards nothing is
    divided, and only the penalties differ: without any, advantages are exactly zero.
    """
    groups = rewards.view(-1, answers)
    equal = zero_variance(rewards, answers)[:, None]
    centred = torch.where(equal, 0.0, groups - groups.mean(dim=1, keepdim=True))
    if penalty is not None:
        penalties = penalty.view(-1, answers)
        centred = centred - (penalties - penalties.mean(dim=1, keepdim=True))
    if kind == "rloo":
        centred = centred * answers / (answers - 1)
    elif kind in ("grpo", "dapo"):
        centred = centred / torch.where(equal, 1.0, groups.std(dim=1, keepdim=True))
    return centred.flatten()


def zero_variance(rewards: Tensor, answers: int) -> Tensor:
    """Whether all answers to a prompt have the same reward: [prompts]."""
    groups = rewards.view(-1, answers)
    return groups.amax(dim=1) - groups.amin(dim=1) < _SMALLEST_DEVIATION


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 a constant one."""
    spread = returns[mask].var(correction=0)
    if spread < _SMALLEST_DEVIATION**2:
        return 0.0
    return (1 - (returns - values)[mask].var(correction=0) / spread).item()
