"""PPO's losses and estimates against Python's doubles, and where its gradients may go."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from rollouts import actor, enumerated, gradient, ppo, ragged, task

from openpalm.align.config import EarlyStoppingSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.advantages import generalised_advantages
from openpalm.align.rollouts.policy_loss import surrogate
from openpalm.align.rollouts.ppo import PpoObjective, estimate, value_losses
from openpalm.align.rollouts.rollout_batch import AdvantageEstimate
from openpalm.errors import SettingsError
from openpalm.model.critic import Bins

BINS = Bins(11, -1.0, 1.0)


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def batch_of_numbers(settings=None):
    rollout = ragged()
    return rollout.with_estimate(estimate(settings or ppo(), rollout, 0.3))


# --- the critic


def squares_by_hand(read, old, returns, clip):
    near = old + min(max(read - old, -clip), clip)
    return max((read - returns) ** 2, (near - returns) ** 2) / 2


def bins_by_hand(logits, returns):
    """Cross entropy against a Gaussian's share of each bin, HL-Gauss, bin by bin."""
    width = (BINS.high - BINS.low) / (BINS.count - 1)
    sigma = 0.75 * width

    def below(x):
        return 0.5 * (1 + math.erf((x - target) / (sigma * math.sqrt(2))))

    target = min(max(returns, BINS.low), BINS.high)
    edges = [BINS.low + (i - 0.5) * width for i in range(BINS.count + 1)]
    shares = [below(high) - below(low) for low, high in itertools.pairwise(edges)]
    total = math.log(sum(map(math.exp, logits)))
    return -sum(s / sum(shares) * (x - total) for s, x in zip(shares, logits, strict=True))


def check_squares(losses):
    batch = batch_of_numbers()
    read = torch.randn(int(batch.mask.sum()), generator=torch.Generator().manual_seed(1))
    found = losses(actor(), read, batch, 0.2)
    old, returns = batch.values[batch.mask].tolist(), batch.returns[batch.mask].tolist()
    wanted = [squares_by_hand(*x, 0.2) for x in zip(read.tolist(), old, returns, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_value_loss_is_the_larger_square():
    check_squares(value_losses)

    def smaller(model, read, batch, clip):
        old, returns = batch.values[batch.mask], batch.returns[batch.mask]
        near = old + (read - old).clamp(-clip, clip)
        return torch.minimum((read - returns).square(), (near - returns).square()) / 2

    def unclipped(model, read, batch, clip):
        return value_losses(model, read, batch, 1e9)

    for bug in (smaller, unclipped):
        fails(check_squares, bug)


def test_with_bins_it_is_the_cross_entropy_of_a_gaussian():
    batch = batch_of_numbers()
    count = int(batch.mask.sum())
    logits = torch.randn(count, BINS.count, generator=torch.Generator().manual_seed(1))
    found = value_losses(actor(bins=BINS), logits, batch, 0.2)
    returns = batch.returns[batch.mask].tolist()
    assert max(map(abs, returns)) > 1, "some lie beyond the bins"
    wanted = [bins_by_hand(*x) for x in zip(logits.tolist(), returns, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("bins", [None, BINS])
def test_the_critics_gradients_are_those_of_finite_differences(bins):
    batch = batch_of_numbers()
    batch = replace(batch, values=batch.values.double(), returns=batch.returns.double())
    shape = (int(batch.mask.sum()), BINS.count) if bins else (int(batch.mask.sum()),)
    read = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = actor(bins=bins)

    def total(x):
        return value_losses(model, x, batch, 0.2).sum()

    assert torch.autograd.gradcheck(total, read.requires_grad_(True))


def test_the_loss_is_the_policys_and_the_weighted_critics():
    settings = ppo(value_loss_coef=0.25, entropy_coef=0.1)
    model, batch = actor(), batch_of_numbers(settings)
    found, sums = PpoObjective(settings).loss(model, batch)
    now = evaluate(model, batch.inputs, batch.targets)
    policy = surrogate(settings, now, batch)[0].sum()
    old, returns = batch.values[batch.mask].tolist(), batch.returns[batch.mask].tolist()
    critic = sum(
        squares_by_hand(*x, 0.2) for x in zip(now.values.tolist(), old, returns, strict=True)
    )
    assert found.item() == pytest.approx(policy.item() + 0.25 * critic, rel=1e-4)
    assert PpoObjective(settings).count(batch) == batch.mask.sum()
    assert sums["value_loss"] == pytest.approx(critic, rel=1e-4)


def test_the_entropy_bonus_has_a_gradient_only_where_it_is_asked_for():
    """With nothing earned, only the bonus moves the policy: towards more entropy."""
    model, rollout = actor(), enumerated(actor())
    zeros = torch.zeros_like(rollout.old_log_probs)
    batch = rollout.with_estimate(AdvantageEstimate(zeros, zeros))

    def found(entropy):
        settings = ppo(entropy_coef=entropy, value_loss_coef=0.0)
        return gradient(model, PpoObjective(settings).loss(model, batch)[0])

    assert not found(0.0).any()
    wanted = gradient(
        model, -evaluate(model, batch.inputs, batch.targets, train_entropy=True).entropy.sum()
    )
    assert torch.allclose(found(0.5), 0.5 * wanted, atol=1e-5)


# --- estimates


def test_estimates_are_by_the_book():
    """GAE over the reward and the penalty; returns from unwhitened advantages; then whitened."""
    settings = ppo(discount=0.9, gae_lambda=0.8)
    rollout = ragged()
    mask, beta = rollout.mask, 0.3
    found = estimate(settings, rollout, beta)
    rewards = -beta * (rollout.old_log_probs - rollout.reference_log_probs)
    for row, counts in enumerate(mask):
        rewards[row, int(counts.nonzero().max())] += rollout.rewards[row]
    plain = generalised_advantages(rewards, rollout.values, mask, discount=0.9, gae_lambda=0.8)
    assert torch.allclose(found.returns, (plain + rollout.values) * mask, atol=1e-6)
    inside = plain[mask]
    wanted = (inside - inside.mean()) / inside.std(correction=0)
    assert torch.allclose(found.advantages[mask], wanted, atol=1e-5)
    unwhitened = estimate(replace(settings, whiten_advantages=False), rollout, beta)
    assert torch.allclose(unwhitened.advantages, plain, atol=1e-6)


def test_the_penalty_is_in_the_reward_or_in_the_loss_not_in_both():
    rollout = ragged()
    for kl in ("k2", "k3"):
        settings = ppo(kl=kl)
        assert torch.equal(
            estimate(settings, rollout, 9.0).returns, estimate(settings, rollout, 0.0).returns
        )
    assert not torch.equal(
        estimate(ppo(), rollout, 9.0).returns, estimate(ppo(), rollout, 0.0).returns
    )


def test_a_perfect_critic_leaves_only_the_noise():
    """Of the enumerated policy: with its true values, advantages have a mean of zero everywhere."""
    rollout = enumerated(actor(), task().rewards[0])
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()
    prefixes: dict = {}
    for row, counts in enumerate(rollout.mask):
        places = counts.nonzero().flatten().tolist()
        for t in places:
            before = tuple(rollout.inputs[row, : t + 1].tolist())
            prefixes.setdefault(before, []).append((row, t))
    values = torch.zeros_like(rollout.old_log_probs)
    for rows in prefixes.values():
        p = torch.stack([chances[row] for row, _ in rows])
        earned = torch.stack([rollout.rewards[row].double() for row, _ in rows])
        for row, t in rows:
            values[row, t] = (p * earned).sum() / p.sum()
    settings = ppo(whiten_advantages=False, kl_coef=0.0, gae_lambda=0.5)
    found = estimate(settings, replace(rollout, values=values), 0.0)
    for rows in prefixes.values():
        p = torch.stack([chances[row] for row, _ in rows])
        gains = torch.stack([found.advantages[row, t].double() for row, t in rows])
        assert abs((p * gains).sum() / p.sum()) < 1e-4


# --- where gradients go


def gradients(kind, part, bins=None):
    """Of the policy's or of the critic's loss alone: those of the policy's and of the critic's."""
    model, batch = actor(kind, bins), batch_of_numbers()
    settings = ppo(critic=kind, value_loss_coef=float(part == "critic"))
    if part == "critic":
        batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    PpoObjective(settings).loss(model, batch)[0].backward()
    norms = {"policy": 0.0, "critic": 0.0}
    for name, p in model.named_parameters():
        reached = 0.0 if p.grad is None else p.grad.abs().sum().item()
        norms["critic" if name.startswith("critic.") else "policy"] += reached
    return norms


def check_leaks(kind, gradients):
    critics, policys = gradients(kind, "critic"), gradients(kind, "policy")
    assert critics["critic"] > 0
    assert policys["policy"] > 0
    assert policys["critic"] == 0
    assert (critics["policy"] > 0) == (kind == "shared")


@pytest.mark.parametrize("kind", ["shared", "detached", "separate"])
def test_the_critics_gradient_reaches_a_shared_trunk_only(kind):
    check_leaks(kind, gradients)
    check_leaks(kind, lambda *given: gradients(*given, bins=BINS))
    other = "detached" if kind == "shared" else "shared"
    fails(check_leaks, kind, lambda _, part: gradients(other, part))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value_bins": 1}, "--value-bins 1: must be 0, or at least 2"),
        ({"value_range": 0.0}, "--value-range 0.0: must be above 0"),
        ({"gae_lambda": 1.5}, r"--gae-lambda 1.5: must be in \[0, 1\]"),
        ({"discount": -0.1}, r"--discount -0.1: must be in \[0, 1\]"),
        ({"value_loss_coef": -1.0}, "--value-loss-coef -1.0: must be 0 or more"),
        ({"value_clip": 0.0}, "--value-clip 0.0: must be above 0"),
        ({"target_kl": 1.0, "kl": "k2"}, "--target-kl: adapts --kl reward, not k2"),
        ({"minibatches": 3}, r"--minibatches 3: must divide prompts x completions \(8\)"),
        ({"temperature": 0.0}, "--temperature 0.0: must be in"),
        ({"temperature": 0.7, "rollout_dtype": "int8"}, "corrected for at --temperature 1"),
        (
            {"early_stopping": EarlyStoppingSettings(gold_drop=1.0)},
            "--early-stopping.gold-drop: needs --gold-reward",
        ),
        ({"rollout_memory_bytes": -1}, "--rollout-memory-bytes -1: must be 0 or more"),
    ],
)
def test_settings_out_of_range(changes, says):
    with pytest.raises(SettingsError, match=says):
        ppo(**changes)
