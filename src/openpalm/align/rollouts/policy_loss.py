"""The clipped policy gradient that PPO and GRPO share (Schulman et al. 2017, equation 7).

With ratio_t = pi(y_t) / pi_old(y_t) and advantage A_t the loss of a token is

    - min(ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t)
    - entropy_coef H(pi)
    + the KL penalty, where --kl puts it into the loss (kl.py)

pi_old is the policy at the start of the rollout. A `high` above `low` is DAPO's "clip-higher"
(Yu et al. 2025).

Departure from the papers: the engine that samples may be less precise than the policy, like an
int8 engine. Its tokens are then weighted by min(pi_old / sampler, cap), truncated importance
sampling (Ionides 2008).
"""

import torch
from torch import Tensor

from openpalm.align.config import RolloutSettings
from openpalm.align.logprobs import Evaluated, evaluate
from openpalm.align.rollouts.kl import loss_penalty
from openpalm.align.rollouts.rollout_batch import RolloutBatch
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


def evaluate_batch(settings: RolloutSettings, model: Transformer, batch: RolloutBatch) -> Evaluated:
    """The current policy's log-probabilities, entropies and values of the batch."""
    return evaluate(
        model,
        batch.inputs,
        batch.targets,
        batch.layout,
        batch.reads,
        temperature=settings.temperature,
        # Without a bonus the entropy is only reported, and its graph would cost memory.
        train_entropy=settings.entropy_coef > 0,
    )


def surrogate(
    settings: RolloutSettings, now: Evaluated, batch: RolloutBatch
) -> tuple[Tensor, Metrics]:
    """The loss of each token [rows, time], 0 outside of completions, and means over the tokens."""
    mask = batch.mask
    # With one step per rollout pi is pi_old. The ratio is then exactly 1 with the gradient of
    # log pi, whatever rounding separates two evaluations of the same weights.
    old = now.log_probs.detach() if settings.one_step else batch.old_log_probs
    ratio = (now.log_probs - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.highest_clip)
    # The minimum is pessimistic: clipping removes the incentive to go further, but a token that
    # became too unlikely with a positive advantage (or too likely with a negative) can return.
    objective = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    losses = -objective * batch.importance_weights - settings.entropy_coef * now.entropy
    losses = losses + loss_penalty(settings, now.log_probs, batch.reference_log_probs, mask)
    with torch.no_grad():
        metrics = {
            "ratio": masked_mean(ratio, mask),
            "clip_fraction": masked_mean((ratio != clipped).float(), mask),
            "entropy": masked_mean(now.entropy, mask),
            "approx_kl": masked_mean(old - now.log_probs, mask),
            "importance_weight": masked_mean(batch.importance_weights, mask),
        }
    return losses * mask, metrics


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the positions where the mask is True."""
    return (values * mask).sum().item() / max(1, int(mask.sum()))


def as_sums(means: Metrics, count: int) -> Metrics:
    """Means times the count, because the trainer divides what objectives report by it."""
    return {name: value * count for name, value in means.items()}
