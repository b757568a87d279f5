"""KL estimators, penalties and the adaptive coefficient, against sums over all 341 completions.

An estimator is right if its mean over all completions, each with its probability, is the exact KL,
or its exact gradient. Each bug is shown to be noticed.
"""

from dataclasses import replace

import pytest
import torch
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
    task,
)

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import kl as kl_file
from openpalm.align.rollouts import ppo as ppo_file
from openpalm.align.rollouts.kl import adapted_coefficient, completion_kl, k1, k2, k3
from openpalm.align.rollouts.policy_loss import surrogate
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate


@pytest.fixture(scope="module")
def policy():
    return moved()


def exact_kl(model):
    """KL(pi || ref) over all completions to the first prompt, with its gradient."""
    inputs, targets = every_completion()
    log_p = token_log_probs(model, inputs, targets).double().sum(dim=-1)
    log_reference = token_log_probs(task().reference, inputs, targets).double().sum(dim=-1)
    return (log_p.exp() * (log_p - log_reference)).sum()


def check_value(estimator, model):
    """Its mean over completions of the policy is the KL."""
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
    """The mean gradient of the loss over completions of the policy, which all earn nothing."""
    rollout = enumerated(model)
    batch = rollout.with_estimate(estimate(settings, rollout, settings.kl_coef))
    now = evaluate(model, batch.inputs, batch.targets)
    losses, _ = surrogate(settings, now, batch)
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()
    return gradient(model, (chances * losses.double().sum(dim=-1)).sum())


def check_exact(model, settings, estimate):
    found = expected_gradient(model, settings, estimate)
    assert distance(found, gradient(model, exact_kl(model))) < 1e-5


@pytest.mark.parametrize("kind", ["dr-grpo", "rloo"])
def test_a_penalty_in_the_reward_has_the_gradient_of_the_kl(policy, kind):
    settings = grpo(**EVERY, kl_coef=1.0, advantage=kind)

    def scaled(settings, rollout, kl_coef):
        """RLOO's n / (n - 1) taken back: all 341 completions are there, not a sample."""
        found = group_file.estimate(settings, rollout, kl_coef).advantages
        return AdvantageEstimate(found * (340 / 341 if kind == "rloo" else 1), 0 * found)

    check_exact(policy, settings, scaled)

    def wrong_sign(settings, rollout, kl_coef):
        return AdvantageEstimate(
            -scaled(settings, rollout, kl_coef).advantages, 0 * rollout.old_log_probs
        )

    def swapped(settings, rollout, kl_coef):
        other = replace(
            rollout,
            old_log_probs=rollout.reference_log_probs,
            reference_log_probs=rollout.old_log_probs,
        )
        return scaled(settings, other, kl_coef)

    for bug in (wrong_sign, swapped):
        fails(check_exact, policy, settings, bug)


def test_a_penalty_per_token_has_the_gradient_of_the_kl(policy):
    settings = ppo(**EVERY, kl_coef=1.0, gae_lambda=1.0, whiten_advantages=False)
    check_exact(policy, settings, ppo_file.estimate)
    fails(check_exact, policy, replace(settings, gae_lambda=0.5), ppo_file.estimate)

    def of_one_token(settings, rollout, kl_coef):
        return AdvantageEstimate(
            -kl_coef * (rollout.old_log_probs - rollout.reference_log_probs), rollout.values
        )

    fails(check_exact, policy, settings, of_one_token)


def test_k2_has_the_gradient_of_the_kl_and_k3_has_not(policy, monkeypatch):
    k2_settings, k3_settings = (grpo(**EVERY, kl_coef=1.0, kl=kl) for kl in ("k2", "k3"))
    check_exact(policy, k2_settings, group_file.estimate)
    fails(check_exact, policy, k3_settings, group_file.estimate)
    found = expected_gradient(policy, k3_settings, group_file.estimate)
    wanted = gradient(policy, exact_kl(policy))
    assert distance(found, wanted) == pytest.approx(0.85, abs=0.02), "as docs/proofs.md says"
    cosine = torch.cosine_similarity(found, wanted, dim=0).item()
    assert cosine == pytest.approx(0.83, abs=0.02), "as docs/proofs.md says"

    per_token = {"k2": lambda d: 0.5 * d.square()}
    monkeypatch.setattr(kl_file, "LOSS_PENALTIES", per_token)
    fails(check_exact, policy, k2_settings, group_file.estimate)


def test_k3_has_the_gradient_of_the_other_kl_token_by_token(policy):
    """sum over contexts of pi(context) KL(ref(. | context) || pi(. | context))."""
    inputs, targets = every_completion()
    counts = targets >= 0
    logits, before = policy.logits(inputs), task().reference.logits(inputs)
    log_p, log_r = (x.log_softmax(dim=-1).double() for x in (logits, before))
    backward = (log_r.exp() * (log_r - log_p)).sum(dim=-1) * counts
    chances = enumerated(policy).old_log_probs.double().sum(dim=-1).exp()
    wanted = gradient(policy, (chances * backward.sum(dim=-1)).sum())
    found = expected_gradient(policy, grpo(**EVERY, kl_coef=1.0, kl="k3"), group_file.estimate)
    assert distance(found, wanted) < 1e-5


def test_the_gradient_is_that_of_the_objective(policy):
    """Rewards and penalty together, up to the constant that the group's mean takes away."""
    kl_coef = 0.3
    settings = grpo(**EVERY, kl_coef=kl_coef)
    inputs, targets = every_completion()
    rewards = task().rewards[0]
    log_p = token_log_probs(policy, inputs, targets).double().sum(dim=-1)
    objective = (log_p.exp() * rewards.double()).sum() - kl_coef * exact_kl(policy)
    rollout = enumerated(policy, rewards)
    batch = rollout.with_estimate(group_file.estimate(settings, rollout, kl_coef))
    losses, _ = surrogate(settings, evaluate(policy, inputs, targets), batch)
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()
    found = gradient(policy, (chances * losses.double().sum(dim=-1)).sum())
    assert distance(found, -gradient(policy, objective)) < 1e-5


@torch.no_grad()
def test_the_kl_of_a_completion_is_its_log_ratio(policy):
    rollout = enumerated(policy)
    each = completion_kl(rollout.old_log_probs, rollout.reference_log_probs).double()
    mean = (rollout.old_log_probs.double().sum(dim=-1).exp() * each).sum()
    assert mean.item() == pytest.approx(exact_kl(policy).item(), rel=1e-4)


# --- the adaptive coefficient


def factor(kl, **changes):
    settings = ppo(**{"target_kl": 2.0} | changes)
    return adapted_coefficient(0.4, kl, 100, settings) / 0.4


def check_factor(factor):
    """Ziegler et al. 2019, section 2.2, with K_beta = 100 completions / a horizon of 1000."""
    assert factor(2.0) == pytest.approx(1)
    assert factor(2.2) == pytest.approx(1 + 0.1 * 100 / 1000)
    assert factor(99.0) == pytest.approx(1 + 0.2 * 100 / 1000)
    assert factor(0.0) == pytest.approx(1 - 0.2 * 100 / 1000)


def test_the_coefficient_follows_the_target():
    check_factor(factor)
    fails(check_factor, lambda kl: factor(4.0 - kl))
    assert factor(99.0, target_kl=None) == 1
