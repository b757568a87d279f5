"""Agreement of rewards with judgements: accuracy, calibration, agreement with ties, Spearman.

Pure functions of numbers, without models and files.
"""

import math
from collections.abc import Sequence

CALIBRATION_BINS = 10


def accuracy(differences: Sequence[float]) -> float:
    """Share of pairs with the larger reward for the chosen completion; differences: r_w - r_l."""
    return sum(d > 0 for d in differences) / len(differences)


def calibration_error(differences: Sequence[float]) -> float:
    """Expected calibration error of sigmoid(|r_w - r_l|), the probability of the larger reward.

    Guo et al. 2017, eq. 3, over ten equal bins of the confidence from 1/2 to 1. 0 is perfect.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(CALIBRATION_BINS)]
    for d in differences:
        confidence = 1 / (1 + math.exp(-min(abs(d), 700)))
        place = int((2 * confidence - 1) * CALIBRATION_BINS)
        bins[min(place, CALIBRATION_BINS - 1)].append((confidence, d > 0))
    gaps = (abs(sum(right - confidence for confidence, right in group)) for group in bins)
    return sum(gaps) / len(differences)


def agreement(differences: Sequence[float], tied: Sequence[float] = ()) -> float:
    """Share of judgements, ties included, that the rewards reproduce.

    differences: r_w - r_l of pairs with a better completion; tied: differences of ties, of either
    sign. Rewards closer than a threshold predict a tie; the threshold is the one that agrees most
    often (Deutsch et al. 2023, "Ties matter", section 4); without ties this is the accuracy.
    """
    right = best = sum(d > 0 for d in differences)
    # A threshold above a pair's difference loses the pair if it was right, gains it if it is a tie.
    passed = sorted([(abs(d), -(d > 0)) for d in differences] + [(abs(d), 1) for d in tied])
    for i, (size, change) in enumerate(passed):
        right += change
        if i + 1 == len(passed) or passed[i + 1][0] > size:
            best = max(best, right)
    return best / len(passed)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman rank correlation, with mean ranks for equal values; nan if one side is constant."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) + 1) / 2
    covariance = math.fsum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    size = math.sqrt(math.fsum((p - mean) ** 2 for p in x) * math.fsum((q - mean) ** 2 for q in y))
    return covariance / size if size else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + 1 + end) / 2
        start = end
    return ranks
