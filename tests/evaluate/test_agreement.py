"""Agreement figures against enumeration and against values computed by hand."""

import math
import random

import pytest

from openpalm.evaluate.agreement import accuracy, agreement, calibration_error, spearman


def test_accuracy_counts_greater_rewards_only():
    assert accuracy([1.0, -1.0, 0.0, 0.5]) == 0.5


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_error_by_hand():
    """Four pairs at 80 %, three right: |0.75 - 0.8|; two at 60 %, none right: 0.6."""
    differences = [logit(0.8)] * 3 + [-logit(0.8)] + [-logit(0.6)] * 2
    assert calibration_error(differences) == pytest.approx((4 * 0.05 + 2 * 0.6) / 6)
    assert calibration_error([1000.0]) == pytest.approx(0)
    assert calibration_error([-1000.0]) == pytest.approx(1)
    assert calibration_error([0.0, 0.0]) == pytest.approx(0.5)  # a half is no choice


def test_rewards_that_are_the_truth_are_calibrated():
    draw = random.Random(0)
    sizes = [abs(draw.gauss(0, 2)) for _ in range(20_000)]
    true = [d if draw.random() < 1 / (1 + math.exp(-d)) else -d for d in sizes]
    assert calibration_error(true) < 0.02
    assert calibration_error([3 * d for d in true]) > 0.08, "too sure shows"


def enumerated(differences, tied):
    """The best over every threshold that could matter."""
    thresholds = [-1.0, *(abs(d) for d in [*differences, *tied])]
    return max(
        (sum(d > 0 and d > t for d in differences) + sum(abs(d) <= t for d in tied))
        / (len(differences) + len(tied))
        for t in thresholds
    )


def check_agreement(agree):
    draw = random.Random(1)
    for _ in range(200):
        values = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
        differences = draw.choices(values, k=draw.randint(1, 8))
        tied = draw.choices(values, k=draw.randint(0, 8))
        assert agree(differences, tied) == pytest.approx(enumerated(differences, tied))


def test_agreement_is_the_best_over_all_thresholds():
    check_agreement(agreement)
    assert agreement([1.0, -1.0, 2.0]) == accuracy([1.0, -1.0, 2.0])
    with pytest.raises(AssertionError):
        check_agreement(lambda differences, tied: accuracy(differences))
    with pytest.raises(AssertionError):
        check_agreement(lambda differences, tied: agreement([-d for d in differences], tied))


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [5, 1, 0, -9]) == pytest.approx(-1)
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here sum d^2 = 6.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4.5]) == pytest.approx(1 - 6 * 4 / 120)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5 over sqrt(1.5 x 2).
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(spearman([1, 1], [1, 2]))
