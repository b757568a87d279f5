"""Calibration by hand, and of probabilities that are the truth."""

import json
import math

import numpy as np
import pytest

from openpalm.feedback.statistics.calibration import accuracy_limit, calibration
from openpalm.feedback.statistics.intervals import Estimate, wilson


def test_by_hand():
    """Confidences 0.8, 0.8, 0.6 and 0.9; the person agrees, disagrees, ties and agrees."""
    found = calibration([0.8, 0.2, 0.6, 0.9], [1, 1, 0.5, 1])
    assert (found.judgements, found.ties) == (4, 1)
    assert found.accuracy == pytest.approx(wilson(2, 3))
    assert found.brier == pytest.approx((0.2**2 + 0.8**2 + 0.1**2 + 0.1**2) / 4)
    logs = [math.log(0.8), math.log(0.2), (math.log(0.6) + math.log(0.4)) / 2, math.log(0.9)]
    assert found.log_loss == pytest.approx(-sum(logs) / 4)
    # Bins: |1 + 0 - 1.6|, |0.5 - 0.6| and |1 - 0.9|.
    assert found.expected_error == pytest.approx((0.6 + 0.1 + 0.1) / 4)
    json.dumps(found.to_json(), allow_nan=False)


def test_bins_by_hand():
    """Four bins: 0.52 and 0.6; none; 0.76 twice; 1."""
    found = calibration([0.52, 0.4, 0.76, 0.24, 1.0], [1, 1, 1, 0, 1], bins=4).bins
    assert [one.judgements for one in found] == [2, 0, 2, 1]
    assert [(one.low, one.high) for one in found][1:3] == [(0.625, 0.75), (0.75, 0.875)]
    assert found[0].mean_confidence == pytest.approx(0.56)
    assert found[0].agreement == pytest.approx(wilson(1, 2))
    assert (found[1].mean_confidence, found[1].agreement) == (None, None)
    assert found[2].agreement.value == 1


def test_swapping_sides_changes_nothing():
    generator = np.random.default_rng(0)
    p = generator.random(200)
    y = generator.choice([0, 0.5, 1], 200)
    swap = generator.random(200) < 0.5
    one = calibration(p, y)
    two = calibration(np.where(swap, 1 - p, p), np.where(swap, 1 - y, y))
    assert (one.accuracy, one.ties) == (pytest.approx(two.accuracy), two.ties)
    assert (one.brier, one.log_loss, one.expected_error) == pytest.approx(
        (two.brier, two.log_loss, two.expected_error)
    )


def test_no_preference_and_certainty():
    even = calibration([0.5] * 4, [1, 0, 1, 0])
    assert (even.accuracy.value, even.brier, even.expected_error) == (0.5, 0.25, 0)
    assert even.log_loss == pytest.approx(math.log(2))
    assert calibration([0.5, 0.5], [1, 1]).accuracy.value == 0.5, "no choice is no agreement"
    sure = calibration([1.0, 0.0], [1, 0])
    assert (sure.accuracy.value, sure.brier, sure.expected_error) == (1, 0, 0)
    assert sure.bins[-1].judgements == 2
    assert math.isfinite(calibration([1.0], [0]).log_loss)
    assert calibration([], []) is None


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not():
    generator = np.random.default_rng(1)
    margins = generator.normal(size=20_000) * 1.5
    p = 1 / (1 + np.exp(-margins))
    y = (generator.random(20_000) < p).astype(float)
    true, sure = calibration(p, y), calibration(1 / (1 + np.exp(-3 * margins)), y)
    assert true.expected_error < 0.015 < 0.1 < sure.expected_error
    assert true.brier < sure.brier
    assert true.log_loss < sure.log_loss
    assert true.accuracy == sure.accuracy
    inside = [one.agreement.low <= one.mean_confidence <= one.agreement.high for one in true.bins]
    assert sum(inside) >= 8


def test_judgements_of_one_prompt_are_one_unit():
    p, y = [0.9] * 30, [1.0] * 20 + [0.0] * 10
    apart = calibration(p, y).accuracy
    together = calibration(p * 5, y * 5, prompts=list(range(30)) * 5).accuracy
    assert together == pytest.approx(apart)


def test_the_limit_of_accuracy():
    """People who choose a in 80 % agree in 68 %; whoever always says a is right in 80 %."""
    assert accuracy_limit(Estimate(0.68, 0.5, 1.0)) == pytest.approx((0.8, 0.5, 1.0))
    assert accuracy_limit(Estimate(0.4, 0.3, 0.5)).value == 0.5
    share = np.random.default_rng(0).random(1000)
    agreement = float((share**2 + (1 - share) ** 2).mean())
    best = np.maximum(share, 1 - share).mean()
    limit = accuracy_limit(Estimate(agreement, agreement, agreement)).value
    assert agreement < best <= limit < best + 0.05


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([1.2], [1], "from 0 to 1"),
        ([math.nan], [1], "from 0 to 1"),
        ([0.5], [0.3], "must be 1"),
        ([0.5, 0.5], [1], "give one for each"),
    ],
)
def test_wrong_input_is_named(p, y, message):
    with pytest.raises(ValueError, match=message):
        calibration(p, y)
