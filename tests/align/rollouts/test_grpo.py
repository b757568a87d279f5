"""The group losses against Python's doubles: what they average over, and what is measured."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from rollouts import actor, gradient, grpo, ragged

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.align.rollouts.grpo import GroupObjective, estimate, token_weights
from openpalm.errors import SettingsError

KINDS = ("grpo", "dr-grpo", "dapo", "rloo")


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def rollout_near(model, **changes):
    """Groups of ragged completions; old log-probabilities near the model's current ones."""
    rollout = ragged(rows=8, num_completions=4)
    with torch.no_grad():
        now = token_log_probs(model, rollout.inputs, rollout.targets)
    near = now + 0.3 * (rollout.old_log_probs + 2 * rollout.mask)
    return replace(rollout, old_log_probs=near, reference_log_probs=now * 0.9, **changes)


def by_hand(settings, batch, log_probs):
    """The mean loss, from the papers: per completion, per token, or over the longest length."""
    completions, tokens = [], []
    for row, counts in enumerate(batch.mask.tolist()):
        found = []
        for t in (t for t, inside in enumerate(counts) if inside):
            new, old = log_probs[row, t].item(), batch.old_log_probs[row, t].item()
            gain, d = (
                batch.advantages[row, t].item(),
                new - batch.reference_log_probs[row, t].item(),
            )
            ratio = math.exp(new - old)
            near = min(max(ratio, 1 - settings.clip_low), 1 + settings.highest_clip)
            loss = -min(ratio * gain, near * gain) * batch.importance_weights[row, t].item()
            found.append(loss + settings.kl_coef * (math.exp(-d) - 1 + d) * (settings.kl == "k3"))
        completions.append(found)
        tokens += found
    if settings.advantage == "dapo":
        return sum(tokens) / len(tokens)
    if settings.advantage == "grpo":
        return statistics.mean(sum(a) / len(a) for a in completions)
    if settings.advantage == "dr-grpo":
        return statistics.mean(sum(a) / settings.max_new_tokens for a in completions)
    return statistics.mean(sum(a) for a in completions)


def check_loss(settings, objective):
    model = actor()
    rollout = rollout_near(model)
    batch = rollout.with_estimate(estimate(settings, rollout, settings.kl_coef))
    loss, _ = objective.loss(model, batch)
    with torch.no_grad():
        log_probs = token_log_probs(model, batch.inputs, batch.targets)
    found = loss.item() / objective.count(batch)
    assert found == pytest.approx(by_hand(settings, batch, log_probs), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kl", ["reward", "k3"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_averages_as_its_paper_does(kind, kl):
    settings = grpo(advantage=kind, kl=kl, kl_coef=0.3, max_new_tokens=7)
    check_loss(settings, GroupObjective(settings))
    for other in KINDS:
        if other != kind:
            fails(check_loss, settings, GroupObjective(replace(settings, advantage=other)))


def test_weights_of_tokens():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert token_weights(mask, "grpo", 8).tolist() == [[0.5], [0.25]]
    assert token_weights(mask, "dr-grpo", 8).tolist() == [[0.125]] * 2
    for kind in ("dapo", "rloo"):
        assert token_weights(mask, kind, 8).tolist() == [[1.0]] * 2


def check_estimate(estimate, settings):
    rollout = ragged(rows=8, num_completions=4)
    found = estimate(settings, rollout, 0.3)
    rewards = rollout.rewards.tolist()
    if settings.kl == "reward":
        for row, counts in enumerate(rollout.mask):
            d = (rollout.old_log_probs - rollout.reference_log_probs)[row][counts].tolist()
            rewards[row] -= 0.3 * sum(d)
    wanted = []
    for part in (slice(0, 4), slice(4, 8)):
        group = rewards[part]
        mean = statistics.mean(group)
        spread = statistics.stdev(rollout.rewards.tolist()[part])  # of the rewards alone
        for r in group:
            others = (r - mean) * 4 / 3
            wanted.append(
                {"rloo": others, "dr-grpo": r - mean}.get(settings.advantage, (r - mean) / spread)
            )
    for row, gain in enumerate(wanted):
        assert found.advantages[row][rollout.mask[row]].tolist() == pytest.approx(
            [gain] * int(rollout.mask[row].sum()), rel=1e-4
        )
    assert not found.advantages[~rollout.mask].any()


@pytest.mark.parametrize("kl", ["reward", "k2", "k3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_its_completions_advantage(kind, kl):
    settings = grpo(advantage=kind, kl=kl)
    check_estimate(estimate, settings)

    def twice_paid(settings, rollout, beta):
        other = "k2" if settings.kl == "reward" else "reward"
        return estimate(replace(settings, kl=other), rollout, beta)

    fails(check_estimate, twice_paid, settings)


def check_equal_groups_teach_nothing(estimate):
    """Equal rewards, no penalty: zero gradient, and no NaN."""
    settings = grpo(advantage="grpo", kl_coef=0.0)
    model = actor()
    rollout = rollout_near(model, rewards=torch.full((8,), 0.1))
    batch = rollout.with_estimate(estimate(settings, rollout, 0.0))
    assert not gradient(model, GroupObjective(settings).loss(model, batch)[0]).any()


def test_equal_groups_teach_nothing():
    check_equal_groups_teach_nothing(estimate)

    def naive(settings, rollout, beta):
        groups = rollout.rewards.view(-1, settings.num_completions)
        each = (groups - groups.mean(1, True)) / groups.std(1, keepdim=True)
        return estimate(settings, rollout, beta)._replace(
            advantages=each.flatten()[:, None] * rollout.mask
        )

    fails(check_equal_groups_teach_nothing, naive)


def test_at_first_the_gradient_is_reinforces():
    """RLOO on fresh completions: the mean of -A grad log pi(completion)."""
    settings, model = grpo(advantage="rloo", kl_coef=0.0), actor()
    rollout = rollout_near(model)
    with torch.no_grad():
        old = token_log_probs(model, rollout.inputs, rollout.targets)
    rollout = replace(rollout, old_log_probs=old, importance_weights=torch.ones_like(old))
    batch = rollout.with_estimate(estimate(settings, rollout, 0.0))
    found = gradient(model, GroupObjective(settings).loss(model, batch)[0])
    log_probs = token_log_probs(model, rollout.inputs, rollout.targets).sum(dim=-1)
    each = [batch.advantages[i][batch.mask[i]][0] for i in range(8)]
    wanted = gradient(model, -(torch.stack(each) * log_probs).sum())
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_temperature_is_the_policys():
    """Scored at the temperature that the completions were drawn at: the ratio is one."""
    model, settings = actor(), grpo(temperature=0.6)
    rollout = ragged(rows=8, num_completions=4)
    with torch.no_grad():
        old = evaluate(model, rollout.inputs, rollout.targets, temperature=0.6).log_probs
    rollout = replace(rollout, old_log_probs=old)
    batch = rollout.with_estimate(estimate(settings, rollout, 0.0))
    ratio = GroupObjective(settings).loss(model, batch)[1]["ratio"] / 8
    assert ratio == pytest.approx(1, abs=1e-6)
    untempered = GroupObjective(grpo()).loss(model, batch)[1]["ratio"] / 8
    assert abs(untempered - 1) > 1e-2


def test_dapo_clips_higher_and_resamples_by_default():
    assert [grpo(advantage=kind).highest_clip for kind in KINDS] == [0.2, 0.2, 0.28, 0.2]
    assert grpo(advantage="dapo", clip_high=0.2).highest_clip == 0.2
    assert [grpo(advantage=kind).resample_limit for kind in KINDS] == [0, 0, 3, 0]
    assert grpo(advantage="dapo", max_resamples=0).resample_limit == 0


def test_settings_out_of_range():
    with pytest.raises(
        SettingsError, match="--num-completions 1: must be 2 or more: they are compared"
    ):
        grpo(num_completions=1)
    with pytest.raises(SettingsError, match="--max-resamples -1: must be 0 or more"):
        grpo(max_resamples=-1)
