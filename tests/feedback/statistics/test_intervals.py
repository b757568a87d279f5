"""Intervals against tables, closed forms and the sampling they describe."""

import math

import numpy as np
import pytest

from openpalm.feedback.statistics.intervals import (
    bootstrap,
    normal_quantile,
    resampled_weights,
    t_quantile,
    unit_means,
    wilson,
    wilson_of_means,
)


def test_wilson_of_a_published_example():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    for successes, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(successes, total) == pytest.approx((successes / total, low, high), abs=5e-5)
    assert wilson(0, 0) is None


def test_t_quantiles_of_the_table():
    """The usual two-sided 95 % and 99 % table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 29: 2.045, 120: 1.980, 500: 1.965}
    assert {df: round(t_quantile(df), 3) for df in table} == table
    assert t_quantile(7, 0.99) == pytest.approx(3.499, abs=5e-4)
    assert t_quantile(10**9) == pytest.approx(normal_quantile(0.95))
    assert t_quantile(201) == pytest.approx(t_quantile(200), abs=1e-4)  # both formulas meet


def test_wilson_of_zeros_and_ones_is_wilson():
    assert wilson_of_means([1, 1, 0, 1, 0]) == pytest.approx(wilson(3, 5))
    assert wilson_of_means([1.0, 0.0], [3, 2]) == pytest.approx(wilson(3, 5))
    assert wilson_of_means([1, 1, 1]) == pytest.approx(wilson(3, 3))
    assert wilson_of_means([0.5] * 8) == pytest.approx(wilson(4, 8)), "no variation: n units"
    assert wilson_of_means([]) is None


def test_repeating_a_unit_adds_no_information():
    """Twenty copies of each vote of an item are one unit, not twenty."""
    units = np.repeat(np.arange(50), 20)
    votes = np.repeat(np.arange(50) % 3 == 0, 20).astype(float)
    assert wilson_of_means(unit_means(units, votes)) == pytest.approx(wilson(17, 50))


@pytest.mark.parametrize("true", [0.5, 0.7, 0.95])
def test_intervals_of_clustered_votes_cover(true):
    """Three labelers an item, half of whom copy the item's own answer."""
    generator = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(600):
        item = generator.random((60, 1)) < true
        own = generator.random((60, 3)) < true
        votes = np.where(generator.random((60, 3)) < 0.7, item, own)
        found = wilson_of_means(votes.mean(axis=1))
        covered += found.low <= true <= found.high
        each = wilson(votes.sum(), votes.size)
        naive += each.low <= true <= each.high
    assert 0.925 <= covered / 600 <= 0.98
    assert naive / 600 < 0.9, "counting every vote as independent is too sure"


def test_resampling_kinds_is_resampling_units():
    """Mean and variance of the drawn numbers are those of the multinomial distribution."""
    weights = np.array([1, 5, 14])
    drawn = resampled_weights(weights, 20_000, np.random.default_rng(0))
    assert (drawn.sum(axis=1) == 20).all()
    assert drawn.mean(axis=0) == pytest.approx(weights, rel=0.02)
    assert drawn.var(axis=0) == pytest.approx(weights * (1 - weights / 20), rel=0.05)


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.arange(100.0)
    ends = bootstrap(lambda w: w @ values / w.sum(axis=1), np.ones(100, int), resamples=4000)
    half = 1.96 * values.std() / 10
    assert ends[:2] == pytest.approx((49.5 - half, 49.5 + half), abs=0.5)
    assert ends[2] == 0


def test_bootstrap_counts_undefined_resamples():
    def undefined_without_the_first(weights):
        return np.where(weights[:, 0] > 0, 1.0, math.nan)

    low, high, undefined = bootstrap(undefined_without_the_first, np.array([1, 2]), seed=3)
    assert (low, high) == (1, 1)
    assert undefined / 1000 == pytest.approx((2 / 3) ** 3, abs=0.05)
    assert bootstrap(lambda w: np.full(len(w), math.nan), np.array([2])) is None


def test_the_seed_decides():
    values = np.arange(10.0)

    def ends(seed):
        return bootstrap(lambda w: w @ values, np.ones(10, int), resamples=50, seed=seed)

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)
