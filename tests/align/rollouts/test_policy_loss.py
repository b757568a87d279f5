"""The policy's loss and its penalties against sums over all 341 answers, and against doubles.

A gradient estimator is right where its mean over all answers, each with its probability, is the
exact gradient. Each bug is shown to be noticed.
"""

import math
from dataclasses import replace

import pytest
import torch
from enumerable import PROMPTS
from rollouts import (
    distance,
    enumerated,
    every_answer,
    experience,
    gradient,
    grpo,
    moved,
    ppo,
    ragged,
    task,
)

from openpalm.align.logprobs import Evaluated, evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import policy_loss as policy_file
from openpalm.align.rollouts import ppo as ppo_file
from openpalm.align.rollouts.policy_loss import k2, k3, surrogate
from openpalm.align.rollouts.rollout import Sampler
from openpalm.align.rollouts.rollout_batch import Estimated

EVERY = {"prompts_per_rollout": 1, "num_completions": 341}


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


@pytest.fixture(scope="module")
def policy():
    return moved()


# --- 6: the distance to the reference


def exact_kl(model):
    """KL(pi || ref) over all answers to the first prompt, with its gradient."""
    inputs, targets = every_answer()
    log_p = token_log_probs(model, inputs, targets).double().sum(dim=-1)
    log_reference = token_log_probs(task().reference, inputs, targets).double().sum(dim=-1)
    return (log_p.exp() * (log_p - log_reference)).sum()


def k1(difference):
    return difference


def check_value(estimator, model):
    """Its mean over answers of the policy is the KL."""
    rollout = enumerated(model)
    difference = (rollout.old_log_probs - rollout.reference_log_probs).double()
    each = estimator(difference).sum(dim=-1)
    mean = (rollout.old_log_probs.double().sum(dim=-1).exp() * each).sum()
    assert mean.item() == pytest.approx(exact_kl(model).item(), rel=1e-4)


@torch.no_grad()
def test_k1_and_k3_have_the_kl_as_their_mean(policy):
    assert exact_kl(policy).item() == pytest.approx(2.5, abs=0.02), "as docs/proofs.md says"
    for estimator in (k1, k3):
        check_value(estimator, policy)
        fails(check_value, lambda d, estimator=estimator: estimator(-d), policy)
    fails(check_value, k2, policy)


def expected_gradient(model, settings, estimate):
    """The mean gradient of the loss over answers of the policy, which all earn nothing."""
    rollout = enumerated(model)
    batch = experience(rollout, estimate(settings, rollout, settings.kl_coef))
    now = evaluate(model, batch.inputs, batch.targets)
    losses, _ = surrogate(settings, now, batch)
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()
    return gradient(model, (chances * losses.double().sum(dim=-1)).sum())


def check_exact(model, settings, estimate):
    found = expected_gradient(model, settings, estimate)
    assert distance(found, gradient(model, exact_kl(model))) < 1e-5


@pytest.mark.parametrize("kind", ["dr-grpo", "rloo"])
def test_paid_in_the_reward_the_gradient_is_that_of_the_kl(policy, kind):
    settings = grpo(**EVERY, kl_coef=1.0, advantage=kind)

    def scaled(settings, rollout, beta):
        """RLOO's n / (n - 1) taken back: all 341 are there, not a sample."""
        found = group_file.estimate(settings, rollout, beta).advantages
        return Estimated(found * (340 / 341 if kind == "rloo" else 1), 0 * found)

    check_exact(policy, settings, scaled)

    def turned_round(settings, rollout, beta):
        return Estimated(-scaled(settings, rollout, beta).advantages, 0 * rollout.old_log_probs)

    def the_wrong_way(settings, rollout, beta):
        other = replace(
            rollout,
            old_log_probs=rollout.reference_log_probs,
            reference_log_probs=rollout.old_log_probs,
        )
        return scaled(settings, other, beta)

    for bug in (turned_round, the_wrong_way):
        fails(check_exact, policy, settings, bug)


def test_paid_token_by_token_the_gradient_is_that_of_the_kl(policy):
    settings = ppo(**EVERY, kl_coef=1.0, gae_lambda=1.0, whiten_advantages=False)
    check_exact(policy, settings, ppo_file.estimate)
    fails(check_exact, policy, replace(settings, gae_lambda=0.5), ppo_file.estimate)

    def of_this_token_alone(settings, rollout, beta):
        return Estimated(
            -beta * (rollout.old_log_probs - rollout.reference_log_probs), rollout.values
        )

    fails(check_exact, policy, settings, of_this_token_alone)


def test_k2_has_that_gradient_and_k3_has_not(policy, monkeypatch):
    k2_settings, k3_settings = (grpo(**EVERY, kl_coef=1.0, kl=kl) for kl in ("k2", "k3"))
    check_exact(policy, k2_settings, group_file.estimate)
    fails(check_exact, policy, k3_settings, group_file.estimate)
    found = expected_gradient(policy, k3_settings, group_file.estimate)
    wanted = gradient(policy, exact_kl(policy))
    assert distance(found, wanted) == pytest.approx(0.85, abs=0.02), "as docs/proofs.md says"
    cosine = torch.cosine_similarity(found, wanted, dim=0).item()
    assert cosine == pytest.approx(0.83, abs=0.02), "as docs/proofs.md says"

    per_token = {"k2": lambda d: 0.5 * d.square()}
    monkeypatch.setattr(policy_file, "_PENALTIES", per_token)
    fails(check_exact, policy, k2_settings, group_file.estimate)


def test_k3_has_the_gradient_of_the_other_kl_token_by_token(policy):
    """sum over contexts of pi(context) KL(ref(. | context) || pi(. | context))."""
    inputs, targets = every_answer()
    counts = targets >= 0
    logits, before = policy.logits(inputs), task().reference.logits(inputs)
    log_p, log_r = (x.log_softmax(dim=-1).double() for x in (logits, before))
    backward = (log_r.exp() * (log_r - log_p)).sum(dim=-1) * counts
    chances = enumerated(policy).old_log_probs.double().sum(dim=-1).exp()
    wanted = gradient(policy, (chances * backward.sum(dim=-1)).sum())
    found = expected_gradient(policy, grpo(**EVERY, kl_coef=1.0, kl="k3"), group_file.estimate)
    assert distance(found, wanted) < 1e-5


# --- the whole objective: E[r] - beta KL


def test_the_gradient_is_that_of_the_objective(policy):
    """Rewards and penalty together, up to the constant that the group's mean takes away."""
    beta = 0.3
    settings = grpo(**EVERY, kl_coef=beta)
    inputs, targets = every_answer()
    rewards = task().rewards[0]
    log_p = token_log_probs(policy, inputs, targets).double().sum(dim=-1)
    objective = (log_p.exp() * rewards.double()).sum() - beta * exact_kl(policy)
    rollout = enumerated(policy, rewards)
    batch = experience(rollout, group_file.estimate(settings, rollout, beta))
    losses, _ = surrogate(settings, evaluate(policy, inputs, targets), batch)
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()
    found = gradient(policy, (chances * losses.double().sum(dim=-1)).sum())
    assert distance(found, -gradient(policy, objective)) < 1e-5


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
    batch = experience(rollout, Estimated(advantages, advantages))
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


def test_figures_are_means_over_the_tokens_alone():
    batch = in_doubles(ragged())
    now = now_of(batch)
    _, told = surrogate(grpo(), now, batch)
    ratios = [math.exp(x) for x in (now.log_probs - batch.old_log_probs)[batch.mask].tolist()]
    count = len(ratios)
    assert told["ratio"] == pytest.approx(sum(ratios) / count)
    assert told["clip_fraction"] == pytest.approx(sum(not 0.8 <= r <= 1.2 for r in ratios) / count)
    assert 0 < told["clip_fraction"] < 1
    assert told["approx_kl"] == pytest.approx(-sum(map(math.log, ratios)) / count)
    assert told["importance_weight"] == pytest.approx(
        batch.importance_weights[batch.mask].mean().item()
    )


# --- a sampler that is not quite the policy


def sampled_by(model, weights, cap=2.0):
    """The engine's own model of those weights, as a policy: log-probabilities of all answers."""
    settings = grpo(**EVERY, rollout_dtype=weights, max_importance_weight=cap)
    sampler = Sampler(model, PROMPTS, frozenset({4}), settings)
    sampler.refresh()
    inputs, targets = every_answer()
    with torch.no_grad():
        log_p = sampler._engine.model.logits(inputs).log_softmax(dim=-1)
    each = log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(targets >= 0, each, 0.0)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_correction_brings_the_gradient_nearer(policy, weights):
    rewards, inputs_targets = task().rewards[0], every_answer()
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
        batch = experience(seen, group_file.estimate(settings, seen, 0.0))
        losses, _ = surrogate(settings, evaluate(policy, *inputs_targets), batch)
        found = gradient(policy, (chances * losses.double().sum(dim=-1)).sum())
        return distance(found, wanted)

    uncorrected, corrected = error(torch.ones_like(weight)), error(weight.clamp_max(2.0))
    assert corrected < 0.8 * uncorrected
