"""Agreement against the worked examples of Krippendorff and Gwet, and against simulated truth."""

import json
import random
from itertools import permutations

import numpy as np
import pytest
from agreement_table import table_of

from openpalm.feedback.statistics.agreement import (
    AgreementCounts,
    agreement_by_rater,
    match_rates,
)
from openpalm.feedback.statistics.intervals import wilson

# Krippendorff 2011, section C: four observers, twelve units, * is missing.
OBSERVERS = ["123321412***", "1233224125**", "*33323422513", "12332441251*"]


def judgements_of(observers):
    return [
        (unit, observer, int(value))
        for observer, values in enumerate(observers)
        for unit, value in enumerate(values)
        if value != "*"
    ]


@pytest.fixture
def published():
    return table_of(range(1, 6), judgements_of(OBSERVERS))


@pytest.mark.parametrize(
    ("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(published, scale, alpha):
    """Krippendorff 2011, sections C and D."""
    found = published.figures(scale)
    assert round(found.alpha.value, 3) == alpha
    assert found.alpha.low < alpha < found.alpha.high <= 1
    assert (found.items, found.paired_items, found.judgements) == (12, 11, 41)


def test_ac1_of_the_published_example(published):
    """Gwet 2014: four raters, twelve subjects; AC1 0.77544, error 0.14295, raw 0.81818."""
    found = published.figures()
    assert found.gwet[:3] == pytest.approx((0.77544, 0.14295, 0.46081), abs=5e-6)
    assert found.gwet.high == 1
    assert found.raw.value == pytest.approx(0.81818, abs=5e-6)


def square(table):
    """Two raters, from their square table of counts."""
    size = range(len(table))
    pairs = [(i, j) for i in size for j in size for _ in range(table[i][j])]
    rows = [(n, rater, pair[rater]) for n, pair in enumerate(pairs) for rater in (0, 1)]
    return table_of(size, rows)


def test_two_abstractors():
    """Gwet 2014: AC1 0.84933; quadratic weights give AC2 0.94024."""
    found = square([[13, 0, 0], [0, 20, 7], [0, 4, 56]])
    assert found.figures().gwet.value == pytest.approx(0.84933, abs=5e-6)
    assert found.figures("interval").gwet.value == pytest.approx(0.94024, abs=5e-6)


def test_alpha_misleads_when_one_answer_dominates_and_ac1_does_not():
    """118, 5, 2, 0 of 125: a table with which Gwet (2008) shows the paradox of kappa."""
    found = square([[118, 5], [2, 0]]).figures()
    assert found.raw.value == pytest.approx(0.944)
    assert found.alpha.value < 0
    assert found.gwet.value == pytest.approx(0.94, abs=0.005)


def test_alpha_by_hand():
    """Two raters, four items: one disagreement. o_ab = 1; n_a = 3, n_b = 5, n = 8."""
    found = square([[1, 1], [0, 2]]).figures()
    assert found.alpha.value == pytest.approx(1 - 7 * 2 / (2 * 3 * 5))
    assert found.raw.value == 0.75
    assert found.shares == {0: 3 / 8, 1: 5 / 8}


def test_alpha_of_pairs_one_by_one():
    """The definition over all pairs of judgements, without tables."""
    draw = random.Random(5)
    rows = [
        (item, rater, draw.choice("abc")) for item in range(30) for rater in range(2 + item % 4)
    ]
    by_item = {}
    for item, _, value in rows:
        by_item.setdefault(item, []).append(value)
    observed = sum(
        sum(a != b for a, b in permutations(values, 2)) / (len(values) - 1)
        for values in by_item.values()
    )
    everything = [value for values in by_item.values() for value in values]
    expected = sum(a != b for a, b in permutations(everything, 2)) / (len(everything) - 1)
    found = table_of("abc", rows).figures(resamples=10)
    assert found.alpha.value == pytest.approx(1 - observed / expected)


def test_perfect_and_undefined_agreement():
    perfect = square([[5, 0], [0, 7]]).figures()
    assert (perfect.alpha.value, perfect.gwet.value, perfect.raw.value) == (1, 1, 1)
    assert perfect.raw.low < 1, "twelve items do not prove perfect agreement"
    constant = square([[5, 0], [0, 0]]).figures()
    assert constant.alpha is None
    assert (constant.raw.value, constant.gwet.value) == (1, 1)
    single = table_of("ab", [(0, 0, "a"), (1, 0, "b")]).figures()
    assert (single.raw, single.alpha, single.gwet) == (None, None, None)
    assert AgreementCounts("ab").figures().judgements == 0


def test_resamples_without_variation_are_counted():
    found = square([[1, 0], [0, 4]]).figures(resamples=500)
    assert 0.2 < found.alpha.undefined_resamples / 500 < 0.5  # (4/5)^5 + (1/5)^5 = 0.328


def simulated(generator, items, raters=3, known=0.6, share=(0.6, 0.3, 0.1)):
    """Raters who know the item's category with probability `known`, else draw from the shares.

    In the population alpha is known^2: two raters share information only if both know.
    """
    truth = generator.choice(3, size=(items, 1), p=share)
    own = generator.choice(3, size=(items, raters), p=share)
    values = np.where(generator.random((items, raters)) < known, truth, own)
    counts = np.stack([(values == category).sum(axis=1) for category in range(3)], axis=1)
    return AgreementCounts.of_items([0, 1, 2], map(tuple, counts.tolist()))


def test_the_interval_of_alpha_covers_the_population_value():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(150):
        found = simulated(generator, 120).figures(resamples=200, seed=seed).alpha
        covered += found.low <= 0.36 <= found.high
    assert covered / 150 >= 0.9


def test_the_interval_of_ac1_covers_the_population_value():
    generator = np.random.default_rng(0)
    true = simulated(generator, 200_000).figures(resamples=2).gwet.value
    found = [simulated(generator, 100).figures(resamples=2).gwet for _ in range(200)]
    assert 0.9 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.98
    errors = np.mean([one.standard_error for one in found])
    assert errors == pytest.approx(np.std([one.value for one in found]), rel=0.15)


def test_patterns_give_what_items_one_by_one_give():
    """The bootstrap over distinct patterns has the spread of the bootstrap over items."""
    table = simulated(np.random.default_rng(3), 150)
    patterns, weights = table.arrays()
    items = np.repeat(patterns, weights, axis=0)
    generator = np.random.default_rng(4)
    values = []
    for _ in range(200):
        drawn = items[generator.integers(0, 150, 150)].tolist()
        again = AgreementCounts.of_items([0, 1, 2], map(tuple, drawn))
        values.append(again.figures(resamples=1).alpha.value)
    found = table.figures(resamples=2000).alpha
    assert np.quantile(values, [0.025, 0.975]) == pytest.approx((found.low, found.high), abs=0.03)


def test_merging():
    rows = [(item, rater, "ab"[item * rater % 2]) for item in range(40) for rater in range(3)]
    halves = [table_of("ab", part) for part in (rows[:60], rows[60:])]
    halves[0].merge(halves[1])
    whole = table_of("ab", rows)
    assert halves[0] == whole
    assert len(whole.arrays()[1]) == 2, "the table grows with distinct patterns, not with items"
    json.dumps(whole.figures(resamples=5).to_json(), allow_nan=False)


def test_a_scale_without_both_bad():
    rows = [(0, 0, 1), (0, 1, 5), (0, 2, 9), (1, 0, 9), (1, 1, 9), (2, 0, 3), (2, 1, 3)]
    table, left_out = table_of([1, 3, 5, 9], rows).regrouped({1: 1, 3: 3, 5: 5})
    kept = [row for row in rows if row[2] != 9]
    assert table == table_of([1, 3, 5], kept)
    assert left_out == 3


def test_agreement_about_the_winner_alone():
    draw = random.Random(2)
    winner = {-2: "a", -1: "a", 0: "tie", 1: "b", 2: "b", 9: "both bad"}
    rows = [(item, rater, draw.choice([*winner])) for item in range(40) for rater in range(3)]
    table, left_out = table_of([*winner], rows).regrouped(winner)
    named = [(item, rater, winner[value]) for item, rater, value in rows]
    assert table == table_of(["a", "tie", "b", "both bad"], named)
    assert left_out == 0


def test_wrong_input_is_named():
    table = AgreementCounts("ab")
    with pytest.raises(ValueError, match="'c' is none of the categories"):
        table.regrouped({"c": "a", "b": "b"})
    for counts in ((1, 0, 0), (2, -1)):
        with pytest.raises(ValueError, match="do not fit"):
            AgreementCounts.of_items("ab", [counts])
    with pytest.raises(ValueError, match="each once"):
        AgreementCounts("aa")
    with pytest.raises(ValueError, match="needs numbers"):
        table.figures("interval")
    with pytest.raises(ValueError, match="categories differ"):
        table.merge(AgreementCounts("abc"))


def test_agreement_with_oneself_and_with_gold():
    found = match_rates([("ann", True), ("ann", False), ("bob", True), ("ann", True)])
    assert found.by_rater == {"ann": wilson(2, 3), "bob": wilson(1, 1)}
    assert found.comparisons == {"ann": 3, "bob": 1}
    assert match_rates([]).by_rater == {}


def rates_of(rows, among=None):
    """Values and comparisons by rater of (item, rater, value)."""
    columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
    numbers = [
        [known.index(value) for known, value in zip(columns, row, strict=True)] for row in rows
    ]
    raters = columns[1]
    of = None if among is None else np.array([rater in among for rater in raters])
    found = agreement_by_rater(*np.array(numbers).T, of)
    values = {raters[n]: one.value for n, one in found.by_rater.items()}
    return values, {raters[n]: number for n, number in found.comparisons.items()}


def test_agreement_of_each_rater_with_the_others():
    rows = [(0, "ann", "a"), (0, "bob", "a"), (0, "cem", "b"), (1, "ann", "b"), (1, "bob", "b")]
    rows += [(2, "cem", "a")]
    values, comparisons = rates_of(rows)
    assert values == pytest.approx({"ann": 0.75, "bob": 0.75, "cem": 0})
    assert comparisons == {"ann": 2, "bob": 2, "cem": 1}


def test_a_model_as_judge_is_measured_against_people():
    rows = [(0, "ann", "a"), (0, "bob", "b"), (0, "judge", "a"), (0, "other judge", "a")]
    rows += [(1, "ann", "b"), (1, "judge", "b"), (2, "judge", "b"), (2, "other judge", "b")]
    values, comparisons = rates_of(rows, among={"ann", "bob"})
    assert values == pytest.approx({"ann": 0, "bob": 0, "judge": 0.75, "other judge": 0.5})
    assert comparisons == {"ann": 1, "bob": 1, "judge": 2, "other judge": 1}


def test_nobody_to_agree_with():
    assert rates_of([(0, "ann", "a"), (1, "bob", "a")]) == ({}, {})
