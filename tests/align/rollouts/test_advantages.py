"""From rewards to advantages, against Python's doubles; each classic bug is shown to be noticed."""

import statistics

import pytest
import torch

from openpalm.align.rollouts.advantages import (
    explained_variance,
    generalised_advantages,
    group_advantages,
    token_rewards,
    whitened,
    zero_variance,
)

KINDS = ("grpo", "dr-grpo", "dapo", "rloo")
MASK = torch.tensor(
    [
        [0, 1, 0, 0, 0, 0],  # one token
        [0, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],  # cut where the completion may be no longer
    ],
    dtype=torch.bool,
)


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def drawn(seed=0):
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed))


# --- 9: where the reward lands


def check_reward_is_on_the_last_token(rewards_of):
    found = rewards_of(torch.tensor([1.0, 2.0, 3.0]), MASK, torch.zeros(3, 6))
    assert found.nonzero().tolist() == [[0, 1], [1, 4], [2, 5]]
    assert found.sum(dim=1).tolist() == [1, 2, 3]


def test_the_reward_is_on_the_last_token_of_every_completion():
    check_reward_is_on_the_last_token(token_rewards)

    def on_last_column(rewards, mask, penalty):
        found = torch.zeros(mask.shape)
        found[:, -1] = rewards
        return found

    def behind_the_end(rewards, mask, penalty):
        return token_rewards(rewards, mask, penalty).roll(1, dims=1)

    def not_on_cut_answers(rewards, mask, penalty):
        ended = ~mask[:, -1]
        return token_rewards(rewards * ended, mask, penalty)

    def on_every_token(rewards, mask, penalty):
        return rewards[:, None] * mask

    for bug in (on_last_column, behind_the_end, not_on_cut_answers, on_every_token):
        fails(check_reward_is_on_the_last_token, bug)


def test_the_penalty_is_subtracted_from_completion_tokens_alone():
    penalty = drawn()
    found = token_rewards(torch.zeros(3), MASK, penalty)
    assert torch.equal(found, torch.where(MASK, -penalty, 0.0))


# --- 10: GAE


def by_hand(rewards, values, mask, discount, gae_lambda):
    """Equation 16 literally: every delta of the completion after t, in doubles, O(T^2)."""
    found = [[0.0] * len(row) for row in mask]
    for row, places in enumerate(mask):
        inside = [t for t, counts in enumerate(places) if counts]
        deltas = {}
        for t in inside:
            following = values[row][t + 1] if t + 1 in inside else 0.0
            deltas[t] = rewards[row][t] + discount * following - values[row][t]
        for t in inside:
            found[row][t] = sum(
                (discount * gae_lambda) ** (k - t) * deltas[k] for k in inside if k >= t
            )
    return found


def check_gae(gae, behind):
    """`behind`: what values and rewards are outside of the completions, where they mean nothing."""
    rewards, values = (torch.where(MASK, drawn(seed), behind) for seed in (1, 2))
    for discount, gae_lambda in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)):
        found = gae(rewards, values, MASK, discount=discount, gae_lambda=gae_lambda)
        wanted = by_hand(rewards.tolist(), values.tolist(), MASK.tolist(), discount, gae_lambda)
        assert torch.allclose(found, torch.tensor(wanted), atol=1e-5)


@pytest.mark.parametrize("behind", [0.0, 1e6, float("inf"), float("nan")])
def test_gae_is_its_equation_and_stops_at_the_end(behind):
    check_gae(generalised_advantages, behind)


def test_gae_past_the_end_or_backwards_is_noticed():
    def past_the_end(rewards, values, mask, *, discount, gae_lambda):
        everything = torch.ones_like(mask)
        return mask * generalised_advantages(
            rewards, values, everything, discount=discount, gae_lambda=gae_lambda
        )

    def value_of_the_same_token(rewards, values, mask, *, discount, gae_lambda):
        shifted = values.roll(1, dims=1)
        return generalised_advantages(
            rewards, shifted, mask, discount=discount, gae_lambda=gae_lambda
        )

    fails(check_gae, past_the_end, 1e6)
    fails(check_gae, value_of_the_same_token, 0.0)


# --- 11: whitening


def check_whitening(whiten):
    """Over all the completions' tokens together, whatever else the tensor holds."""
    values = 3 + 2 * drawn()
    found = whiten(values, MASK)
    inside = found[MASK].double()
    assert abs(inside.mean()) < 1e-6
    assert abs(inside.std(correction=0) - 1) < 1e-5
    assert not found[~MASK].any()
    assert torch.equal(values[MASK].argsort(), inside.argsort())
    wider = torch.cat([torch.where(MASK, values, 1e6), torch.full((3, 5), -1e6)], dim=1)
    mask = torch.cat([MASK, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    assert torch.allclose(whiten(wider, mask)[:, :6], found, atol=1e-5)


def test_whitening():
    check_whitening(whitened)

    def of_each_answer(values, mask):
        return torch.cat([whitened(v[None], m[None]) for v, m in zip(values, mask, strict=True)])

    def with_padding(values, mask):
        return whitened(values, torch.ones_like(mask)) * mask

    def mirrored(values, mask):
        return -whitened(values, mask)

    for bug in (of_each_answer, with_padding, mirrored):
        fails(check_whitening, bug)


def test_equal_advantages_whiten_to_zero():
    assert whitened(torch.full((3, 6), 0.1), MASK).abs().max() < 0.1  # NaN is not


# --- 12: groups


def check_groups(advantages, kind):
    """Against doubles; a prompt that pays more for every completion changes nothing."""
    rewards = torch.tensor([1.0, 2.0, 4.0, -3.0, 0.5, 0.5, 2.5, 2.5])
    found = advantages(rewards, 4, kind)
    wanted = []
    for group in (rewards[:4].tolist(), rewards[4:].tolist()):
        for i, r in enumerate(group):
            if kind == "rloo":
                others = group[:i] + group[i + 1 :]
                wanted.append(r - statistics.mean(others))
            elif kind == "dr-grpo":
                wanted.append(r - statistics.mean(group))
            else:
                wanted.append((r - statistics.mean(group)) / statistics.stdev(group))
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    richer = rewards + torch.tensor([0.0] * 4 + [64.0] * 4)
    assert torch.allclose(advantages(richer, 4, kind), found, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_compared_with_its_own_group(kind):
    check_groups(group_advantages, kind)

    def all_together(rewards, num_completions, kind):
        return group_advantages(rewards, len(rewards), kind)

    def ordered_by_completion(rewards, num_completions, kind):
        groups = rewards.view(num_completions, -1).T.flatten()
        return group_advantages(groups, num_completions, kind).view(-1, num_completions).T.flatten()

    def wrong_sign(rewards, num_completions, kind):
        return -group_advantages(rewards, num_completions, kind)

    for bug in (all_together, ordered_by_completion, wrong_sign):
        fails(check_groups, bug, kind)


def check_equal_rewards(advantages, kind):
    """Rewards whose float32 mean is not quite themselves, and one group that differs."""
    rewards = torch.tensor([0.1] * 7 + [1e4 / 3] * 7 + [0.0] * 6 + [1.0])
    found = advantages(rewards, 7, kind)
    assert torch.equal(found[:14], torch.zeros(14))
    assert found[14:].isfinite().all()
    assert found[14:].abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_equal_rewards_teaches_nothing(kind):
    check_equal_rewards(group_advantages, kind)

    def divided_by_nothing(rewards, num_completions, kind):
        groups = rewards.view(-1, num_completions)
        return ((groups - groups.mean(1, True)) / groups.std(1, keepdim=True)).flatten()

    def by_a_little(rewards, num_completions, kind):
        groups = rewards.view(-1, num_completions)
        return ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-8)).flatten()

    for bug in (divided_by_nothing, by_a_little):
        fails(check_equal_rewards, bug, kind)


def test_which_groups_are_equal():
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0, 0.0])
    assert zero_variance(rewards, 2).tolist() == [True, False, True]
    assert zero_variance(rewards[:1], 1).tolist() == [True]


def test_explained_variance():
    returns = drawn()
    assert explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert explained_variance(returns + 5, returns, MASK) == pytest.approx(1)
    assert explained_variance(torch.zeros(3, 6), returns, MASK) == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(3, 6), MASK) == 0
    elsewhere = torch.where(MASK, returns, 1e6)
    assert explained_variance(elsewhere, returns, MASK) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr-grpo", "rloo"])
def test_noise_in_the_penalty_of_equal_rewards_stays_noise(kind):
    penalty = 1e-4 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([3.0] * 8 + [0.0, 1.0] * 4)
    found = group_advantages(rewards, 8, kind, penalty)
    without = group_advantages(rewards, 8, kind)
    assert 0 < found[:8].abs().max() < 1e-3
    deviation = statistics.stdev([0.0, 1.0] * 4) if kind in ("grpo", "dapo") else 1.0
    scale = 8 / 7 if kind == "rloo" else 1 / deviation
    centred = penalty[8:] - penalty[8:].mean()
    torch.testing.assert_close(found[8:], without[8:] - scale * centred)
