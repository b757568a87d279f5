"""One judgement from several: against the fit of Bradley and Terry, and by hand."""

from itertools import combinations

import numpy as np
import pytest

from openpalm.feedback.statistics.board import Comparison
from openpalm.feedback.statistics.bradley_terry import fit
from openpalm.feedback.statistics.consensus import consensus, ranking

A, B = {"better": 0, "worse": 1, "strength": 1}, {"better": 1, "worse": 0, "strength": 2}
A3 = A | {"strength": 3}
TIE, BAD = {"tie": [0, 1]}, {"both_bad": [0, 1]}


def rankings(seed, answers, labelers):
    """Random rankings; about a third of the neighbours are tied."""
    generator = np.random.default_rng(seed)
    for _ in range(labelers):
        order = [[int(i)] for i in generator.permutation(answers)]
        for n in range(answers - 1, 0, -1):
            if generator.random() < 0.33:
                order[n - 1 : n + 1] = [order[n - 1] + order[n]]
        yield order


@pytest.mark.parametrize("seed", range(12))
def test_rankings_are_ordered_as_by_bradley_and_terry(seed):
    answers, labelers = 3 + seed % 4, 3 + seed % 3
    orders = list(rankings(seed, answers, labelers))
    comparisons = []
    for order in orders:
        place = {i: rank for rank, group in enumerate(order) for i in group}
        for i, j in combinations(range(answers), 2):
            outcome = "a" if place[i] < place[j] else "b" if place[i] > place[j] else "tie"
            comparisons.append(Comparison(f"{i}", f"{j}", outcome))
    board = fit(comparisons)
    strengths = [board[f"{i}"].value for i in range(answers)]
    found = ranking(orders)
    assert sorted(i for group in found for i in group) == list(range(answers))
    levels = [np.mean([strengths[i] for i in group]) for group in found]
    assert levels == sorted(levels, reverse=True)
    for group in found:
        assert np.ptp([strengths[i] for i in group]) == pytest.approx(0, abs=1e-6)
    assert len({round(strength, 6) for strength in strengths}) == len(found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([A], A),
        ([A, A3, B], A),
        ([A3, A3, A, TIE, B], A3),
        ([TIE, TIE, A], TIE),
        ([BAD, BAD, TIE], BAD),
        ([A, B], None),
        ([A, A, BAD, TIE], None),
    ],
)
def test_a_comparison_needs_a_majority_and_ties_are_kept(given, expected):
    assert consensus("compare", given) == expected


def test_thumbs_and_ratings():
    up, down = {"up": True, "candidate": 0}, {"up": False, "candidate": 0}
    assert consensus("thumb", [up, down, down]) == down
    assert consensus("thumb", [up, down]) is None
    rated = [{"ratings": {"truth": n, "style": 6 - n}, "candidate": 0} for n in (1, 4, 5, 5)]
    assert consensus("rate", rated) == {"ratings": {"truth": 4, "style": 1}, "candidate": 0}


def test_texts_have_none():
    with pytest.raises(ValueError, match="no consensus of edit"):
        consensus("edit", [{"candidate": 0, "text": "x"}])
