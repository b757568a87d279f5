"""Best-of-n against enumeration: expected reward and KL divergence from the policy."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny

from openpalm.align.judging.best_of_n import (
    SamplingPlan,
    best_and_worst,
    best_worst_pairs,
    expected_maximum,
    kl_bound,
    summary,
)
from openpalm.generate.engine import Engine


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def check_mean_over_subsets(estimate):
    rewards = [0.3, -1.0, 2.5, 2.5, 0.0, 7.0]
    for n in range(1, 7):
        subsets = list(itertools.combinations(rewards, n))
        mean = math.fsum(map(max, subsets)) / len(subsets)
        assert estimate(rewards, n) == pytest.approx(mean, abs=1e-12)


def test_the_estimate_is_the_mean_over_all_subsets():
    check_mean_over_subsets(expected_maximum)
    fails(check_mean_over_subsets, lambda rewards, n: max(rewards[:n]))


def check_unbiased(estimate):
    """The mean over all samples of 4 is the exact expected best of 2."""
    chances = {0.0: 0.5, 1.0: 0.3, 5.0: 0.2}
    exact = sum(
        chances[a] * chances[b] * max(a, b) for a, b in itertools.product(chances, repeat=2)
    )
    found = sum(
        math.prod(chances[r] for r in sample) * estimate(sample, 2)
        for sample in itertools.product(chances, repeat=4)
    )
    assert found == pytest.approx(exact, abs=1e-12)


def test_the_estimate_is_unbiased():
    check_unbiased(expected_maximum)

    def with_replacement(rewards, n):
        ordered = sorted(rewards)
        return sum(
            (((i + 1) / len(rewards)) ** n - (i / len(rewards)) ** n) * r
            for i, r in enumerate(ordered)
        )

    fails(check_unbiased, with_replacement)


def test_more_draws_than_the_sample_has_are_refused():
    with pytest.raises(AssertionError):
        expected_maximum([1.0], 2)


def test_large_samples_stay_finite():
    assert expected_maximum(list(range(4096)), 2048) == pytest.approx(4095 - 1, abs=0.01)


def check_bounded(bound):
    """KL of the best of n, enumerated over five completions with different rewards."""
    policy = [0.4, 0.3, 0.15, 0.1, 0.05]  # from the worst to the best
    below = list(itertools.accumulate(policy, initial=0.0))
    for n in (1, 2, 4, 8, 64):
        best = [below[i + 1] ** n - below[i] ** n for i in range(5)]
        kl = math.fsum(p * math.log(p / q) for p, q in zip(best, policy, strict=True) if p)
        assert -1e-12 <= kl <= bound(n) + 1e-12
    fine = 20_000  # ever more answers, each improbable: the bound is what it tends to
    kl = math.fsum(
        p * math.log(p * fine)
        for i in range(fine)
        if (p := ((i + 1) / fine) ** 4 - (i / fine) ** 4) > 0
    )
    assert kl == pytest.approx(bound(4), abs=1e-3)


def test_the_kl_bound():
    check_bounded(kl_bound)
    fails(check_bounded, lambda n: math.log(n))
    fails(check_bounded, lambda n: math.log(n) - 1)


def test_the_first_of_equals():
    assert best_and_worst([1.0, 3.0, 3.0, 0.0, 0.0]) == (1, 3)


def test_figures_and_pairs():
    def row(best, worst, rewards):
        return {"prompt": [], "completion": best, "worst": worst, "rewards": rewards}

    rows = [
        row("a", "b", [1.0, 3.0, 2.0]),
        row("a", " a", [0.0, 1.0, 0.0]),
        row("a", "b", [4.0] * 3),
    ]
    told = summary(rows, 3)
    assert told["reward"] == pytest.approx((2 + 1 / 3 + 4) / 3)
    assert told["reward_best"] == pytest.approx((3 + 1 + 4) / 3)
    assert list(told["reward_by_n"]) == ["1", "2", "3"]
    assert list(best_worst_pairs(rows)) == [
        {"prompt": [], "chosen": "a", "rejected": "b", "margin": 2.0}
    ]


def test_an_answer_does_not_depend_on_what_is_drawn_with_it():
    engine, draw = Engine(tiny(), slots=8), SamplingPlan(3, 6, 4.0, 7)
    prompts = [[1, 2], [3], [4, 5, 6]]
    together = draw.sample(engine, prompts, [0, 1, 2], frozenset({9}))
    alone = [a for i in range(3) for a in draw.sample(engine, prompts, [i], frozenset({9}))]
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert len({tuple(a.ids) for a in together}) == 9
    other = draw._replace(seed=8).sample(engine, prompts, [0], frozenset({9}))
    assert [a.ids for a in other] != [a.ids for a in together[:3]]


@torch.no_grad()
def test_the_best_of_n_earns_what_enumeration_says():
    """One token of five: the mean best of 4 over many prompts, within 3 standard errors."""
    model = tiny(vocab_size=5)
    chances = model.logits(torch.tensor([[1, 2]]))[0, -1].softmax(-1).tolist()
    exact = sum(
        math.prod(chances[i] for i in four) * max(four)
        for four in itertools.product(range(5), repeat=4)
    )
    draw, count = SamplingPlan(4, 1, 1.0, 0), 800
    answers = draw.sample(Engine(model, slots=64), [[1, 2]] * count, range(count), frozenset())
    best = torch.tensor([float(a.ids[0]) for a in answers]).view(count, 4).amax(1)
    assert abs(best.mean() - exact) <= 3 * best.std() / count**0.5
