"""Active selection: scores by hand, exact shares, and a random arm that stays unbiased."""

import math
from collections import Counter

import numpy as np
import pytest

from openpalm.feedback.statistics.selection import (
    bald,
    choose_batch,
    in_reserve,
    policy_uncertainty,
    selection_scores,
)


def logit(p):
    return math.log(p / (1 - p))


def test_bald_by_hand():
    """Members that are sure and disagree tell most; members that are all unsure tell nothing."""
    margins = np.array([[50.0, 0.0, 3.0, logit(0.9)], [-50.0, 0.0, 3.0, logit(0.3)]])
    expected = _entropy(0.6) - (_entropy(0.9) + _entropy(0.3)) / 2
    assert bald(margins) == pytest.approx([math.log(2), 0, 0, expected], abs=1e-9)


def _entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_policy_uncertainty():
    found = policy_uncertainty(np.array([0.0, 2.0, -2.0, 1000.0]))
    assert found[0] == 1
    assert found[1] == pytest.approx(found[2])
    assert found[1] == pytest.approx(4 * math.e**2 / (1 + math.e**2) ** 2)
    assert found[3] == 0


def test_scores_are_mean_ranks():
    ensemble = np.array([[9.0, 0.1, 0.0], [-9.0, -0.1, 0.0]])  # falling disagreement
    policy = np.array([5.0, 0.0, 1.0])
    assert selection_scores(ensemble) == pytest.approx([5 / 6, 3 / 6, 1 / 6])
    assert selection_scores(None, policy) == pytest.approx([1 / 6, 5 / 6, 3 / 6])
    assert selection_scores(ensemble, policy) == pytest.approx([3 / 6, 4 / 6, 2 / 6])
    assert selection_scores(ensemble, policy, policy_weight=0) == pytest.approx(
        selection_scores(ensemble)
    )
    assert selection_scores(None, np.zeros(4)) == pytest.approx([0.5] * 4), "equal values"
    with pytest.raises(ValueError, match="two or more"):
        selection_scores(ensemble[:1])
    with pytest.raises(ValueError, match="or both"):
        selection_scores()


def pool(size=400, per_prompt=2):
    return [f"prompt {n // per_prompt}" for n in range(size)]


@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_the_random_share_is_exact(size):
    scores = np.random.default_rng(0).random(400)
    batch = choose_batch(pool(), scores, size, seed=1)
    arms = Counter(choice.arm for choice in batch.choices)
    assert arms["random"] == math.ceil(3 * size / 10)
    assert len({choice.pair for choice in batch.choices}) == size
    assert batch.missing_random == 0


def test_the_share_is_not_rounded_up_by_floating_point():
    """0.28 * 25 is 7.000000000000001 as a float."""
    batch = choose_batch(pool(), np.ones(400), 25, random_share=0.28, seed=0)
    assert len(chosen(batch, "random")) == 7


def test_the_seed_decides():
    scores = np.random.default_rng(0).random(400)
    one, same, other = (choose_batch(pool(), scores, 50, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_arms_keep_to_their_prompts():
    prompts = pool()
    batch = choose_batch(prompts, np.ones(400), 100, seed=3)
    for choice in batch.choices:
        assert in_reserve(prompts[choice.pair]) == (choice.arm == "random")
    shares = [in_reserve(f"p{n}", 0.3, seed) for n in range(5000) for seed in (0, 1)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert not any(in_reserve(n, 0.0) for n in range(100))
    assert all(in_reserve(n, 1.0) for n in range(100))


def test_the_random_arm_does_not_look_at_the_scores():
    prompts = pool()
    scores = np.random.default_rng(0).random(400)
    one, other = (choose_batch(prompts, each, 60, seed=5) for each in (scores, 1 - scores))
    assert chosen(one, "random") == chosen(other, "random")
    assert chosen(one, "active") != chosen(other, "active")


def chosen(batch, arm):
    return {choice.pair for choice in batch.choices if choice.arm == arm}


def test_every_reserved_pair_is_as_likely():
    prompts = pool(60)
    reserve = {n for n in range(60) if in_reserve(prompts[n])}
    counts = Counter()
    for seed in range(1000):
        counts.update(chosen(choose_batch(prompts, np.arange(60.0), 20, seed=seed), "random"))
    expected = 1000 * 6 / len(reserve)
    assert set(counts) == reserve
    spread = 5 * math.sqrt(expected)
    assert all(abs(counts[n] - expected) < spread for n in reserve)


def test_the_random_arm_stays_unbiased_batch_after_batch():
    """Hard pairs score high, so what active choice leaves is easy; the random arm must not be."""
    found, left = [], []
    for run in range(60):
        hardness = np.random.default_rng(run).random(300)
        open_pairs = list(range(300))
        for batch_number in range(4):
            prompts = [f"{run}/{n}" for n in open_pairs]
            batch = choose_batch(prompts, hardness[open_pairs], 40, seed=batch_number)
            taken = {
                arm: [open_pairs[n] for n in chosen(batch, arm)] for arm in ("random", "active")
            }
            found.append(hardness[taken["random"]].mean())
            open_pairs = [n for n in open_pairs if n not in {*taken["random"], *taken["active"]}]
        left.append(hardness[open_pairs].mean())
    assert np.mean(found) == pytest.approx(0.5, abs=0.015)
    assert np.mean(left) < 0.42, "a draw from what is left over would have been biased"


def test_active_choice_is_greedy_and_spreads_over_prompts():
    """Two prompts: scores 1.0, 0.9, 0.8 and 0.5, 0.3: 1.0, then 0.5 > 0.9 / 2 > 0.3 / 2."""
    active = [name for name in map(str, range(100)) if not in_reserve(name)][:2]
    prompts = [active[0]] * 3 + [active[1]] * 2
    scores = [1.0, 0.9, 0.8, 0.5, 0.3]
    sizes = {2: {0, 3}, 3: {0, 1, 3}, 4: {0, 1, 2, 3}}
    for size, expected in sizes.items():
        batch = choose_batch(prompts, scores, size, random_share=0, seed=size)
        assert chosen(batch, "active") == expected


def test_greedy_equals_trying_all():
    generator = np.random.default_rng(4)
    prompts = [int(n) for n in generator.integers(0, 12, 80)]
    scores = generator.random(80)
    taken, expected = Counter(), []
    for _ in range(30):
        best = max(
            (n for n in range(80) if n not in expected),
            key=lambda n: scores[n] / (1 + taken[prompts[n]]),
        )
        expected.append(best)
        taken[prompts[best]] += 1
    batch = choose_batch(prompts, scores, 30, random_share=0, seed=0)
    assert chosen(batch, "active") == set(expected)


def test_an_arm_that_runs_out_leaves_its_places():
    names = list(map(str, range(400)))
    reserve = [name for name in names if in_reserve(name)]
    rest = [name for name in names if not in_reserve(name)]
    few = choose_batch(reserve[:2] + rest[:50], np.ones(52), 20, seed=0)
    assert Counter(choice.arm for choice in few.choices) == {"random": 2, "active": 18}
    assert few.missing_random == 4
    only = choose_batch(reserve[:30] + rest[:1], np.ones(31), 20, seed=0)
    assert Counter(choice.arm for choice in only.choices) == {"random": 19, "active": 1}
    assert only.missing_random == 0
    assert choose_batch([], [], 5, seed=0).choices == ()
    assert len(choose_batch(rest[:3], np.ones(3), 5, seed=0).choices) == 3


def test_the_order_does_not_show_the_arm():
    batch = choose_batch(pool(), np.ones(400), 100, seed=0)
    places = [n for n, choice in enumerate(batch.choices) if choice.arm == "random"]
    assert 35 < np.mean(places) < 65


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        choose_batch(["a"], [-1], 1, seed=0)
    with pytest.raises(ValueError, match="at least 0"):
        choose_batch(["a"], [], 1, seed=0)
