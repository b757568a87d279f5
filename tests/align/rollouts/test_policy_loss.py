"""The clipped loss against the papers' equations in doubles, and importance weights.

Each bug is shown to be noticed.
"""

import math
from dataclasses import replace

import pytest
import torch
from enumerable import PROMPTS
from rollouts import (
    EVERY,
    distance,
    enumerated,
    every_completion,
    fails,
    gradient,
    grpo,
    moved,
    ppo,
    ragged,
    task,
)

from openpalm.align.logprobs import Evaluated, evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts.policy_loss import surrogate
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate
from openpalm.align.rollouts.sampler import Sampler


@pytest.fixture(scope="module")
def policy():
    return moved()


# --- equation 7, in doubles


def now_of(batch, seed=5, size=0.4):
    """Log-probabilities near the old ones, so that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    noise = size * torch.randn(batch.old_log_probs.shape, generator=generator, dtype=torch.float64)
    entropy = torch.rand(batch.old_log_probs.shape, generator=generator, dtype=torch.float64)
    return Evaluated((batch.old_log_probs + noise) * batch.mask, entropy * batch.mask, None)


def in_doubles(rollout):
    generator = torch.Generator().manual_seed(9)
    advantages = torch.randn(rollout.old_log_probs.shape, generator=generator) * rollout.mask
    batch = rollout.with_estimate(AdvantageEstimate(advantages, advantages))
    columns = (
        "old_log_probs",
        "reference_log_probs",
        "importance_weights",
        "values",
        "advantages",
        "returns",
    )
    return replace(batch, **{name: getattr(batch, name).double() for name in columns})


def by_hand(settings, now, batch):
    """Each token's loss, from the papers' equations."""
    rows = []
    for row, places in enumerate(batch.mask.tolist()):
        inside = [t for t, counts in enumerate(places) if counts]
        new, old, ref, weight, gain, entropy = (
            column[row].tolist()
            for column in (
                now.log_probs,
                batch.old_log_probs,
                batch.reference_log_probs,
                batch.importance_weights,
                batch.advantages,
                now.entropy,
            )
        )
        whole = sum(new[t] - ref[t] for t in inside)
        found = [0.0] * len(places)
        for t in inside:
            ratio = math.exp(new[t] - old[t])
            near = min(max(ratio, 1 - settings.clip_low), 1 + settings.highest_clip)
            found[t] = -weight[t] * min(ratio * gain[t], near * gain[t])
            found[t] -= settings.entropy_coef * entropy[t]
            d = new[t] - ref[t]
            if settings.kl == "k2":
                found[t] += settings.kl_coef * d * whole / 2
            elif settings.kl == "k3":
                found[t] += settings.kl_coef * (math.exp(-d) - 1 + d)
        rows.append(found)
    return rows


def label(settings):
    return f"{settings.kl} {settings.highest_clip} {settings.entropy_coef}"


HOWS = [
    grpo(),
    grpo(kl="k2", kl_coef=0.3),
    grpo(kl="k3", kl_coef=0.3, clip_low=0.1, clip_high=0.4),
    grpo(advantage="dapo"),
    ppo(entropy_coef=0.2),
]


def check_equation(loss, settings):
    batch = in_doubles(ragged())
    now = now_of(batch)
    found = loss(settings, now, batch)[0]
    wanted = torch.tensor(by_hand(settings, now, batch), dtype=torch.float64)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("settings", HOWS, ids=label)
def test_losses_are_the_papers_equations(settings):
    check_equation(surrogate, settings)

    def clipped_alone(settings, now, batch):
        """The minimum left out: a bad step that went far could not be taken back."""
        ratio = (now.log_probs - batch.old_log_probs).exp()
        near = ratio.clamp(1 - settings.clip_low, 1 + settings.highest_clip)
        losses, _ = surrogate(settings, now, batch)
        taken = torch.minimum(ratio * batch.advantages, near * batch.advantages)
        return (losses + (taken - near * batch.advantages) * batch.importance_weights,)

    def symmetric(settings, now, batch):
        return surrogate(replace(settings, clip_high=settings.clip_low / 2), now, batch)

    for bug in (clipped_alone, symmetric):
        fails(check_equation, bug, settings)


@pytest.mark.parametrize("settings", HOWS, ids=label)
def test_gradients_are_those_of_finite_differences(settings):
    batch = in_doubles(ragged())
    now = now_of(batch)

    def total(log_probs, entropy):
        return surrogate(settings, Evaluated(log_probs, entropy, None), batch)[0].sum()

    given = [x.clone().requires_grad_(True) for x in (now.log_probs, now.entropy)]
    assert torch.autograd.gradcheck(total, given)


def test_metrics_are_means_over_the_tokens_alone():
    batch = in_doubles(ragged())
    now = now_of(batch)
    _, metrics = surrogate(grpo(), now, batch)
    ratios = [math.exp(x) for x in (now.log_probs - batch.old_log_probs)[batch.mask].tolist()]
    count = len(ratios)
    assert metrics["ratio"] == pytest.approx(sum(ratios) / count)
    assert metrics["clip_fraction"] == pytest.approx(
        sum(not 0.8 <= r <= 1.2 for r in ratios) / count
    )
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["approx_kl"] == pytest.approx(-sum(map(math.log, ratios)) / count)
    assert metrics["importance_weight"] == pytest.approx(
        batch.importance_weights[batch.mask].mean().item()
    )


# --- importance weights


def sampled_by(model, weights, cap=2.0):
    """Log-probabilities of all completions under the engine's model with those weights."""
    settings = grpo(**EVERY, rollout_dtype=weights, max_importance_weight=cap)
    sampler = Sampler(model, PROMPTS, frozenset({4}), settings)
    sampler.refresh()
    inputs, targets = every_completion()
    with torch.no_grad():
        log_p = sampler._engine.model.logits(inputs).log_softmax(dim=-1)
    each = log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(targets >= 0, each, 0.0)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_importance_weights_bring_the_gradient_nearer(policy, weights):
    rewards, inputs_targets = task().rewards[0], every_completion()
    sampled = sampled_by(policy, weights)
    chances = sampled.double().sum(dim=-1).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-2)
    log_p = token_log_probs(policy, *inputs_targets).double().sum(dim=-1)
    wanted = -gradient(policy, (log_p.exp() * rewards.double()).sum())
    rollout = enumerated(policy, rewards)
    weight = (rollout.old_log_probs - sampled).exp().where(rollout.mask, 1.0)
    assert (weight[rollout.mask] - 1).abs().max() > 1e-4

    def error(correction):
        seen = replace(rollout, importance_weights=correction)
        settings = grpo(**EVERY, kl_coef=0.0)
        batch = seen.with_estimate(group_file.estimate(settings, seen, 0.0))
        losses, _ = surrogate(settings, evaluate(policy, *inputs_targets), batch)
        found = gradient(policy, (chances * losses.double().sum(dim=-1)).sum())
        return distance(found, wanted)

    uncorrected, corrected = error(torch.ones_like(weight)), error(weight.clamp_max(2.0))
    assert corrected < 0.8 * uncorrected
