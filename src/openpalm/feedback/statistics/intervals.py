"""Intervals of proportions and means: Wilson, Wilson for clustered data, Student's t, bootstrap.

Pure functions of numbers. The other files of this folder use them.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""probability that an interval is made to cover the true value with"""


class Estimate(NamedTuple):
    """A figure with the two ends of its interval, as the pages show it."""

    value: float
    low: float
    high: float


def normal_quantile(level: float = LEVEL) -> float:
    """The z of a two-sided interval: 1.96 for level 0.95."""
    return NormalDist().inv_cdf((1 + level) / 2)


@cache
def t_quantile(df: int, level: float = LEVEL) -> float:
    """Quantile of Student's t for a two-sided interval with `df` degrees of freedom.

    Solves the closed form of the distribution function for whole degrees of freedom (Abramowitz
    and Stegun 1964, 26.7.3 and 26.7.4) by bisection; above 200 their expansion 26.7.5 is exact to
    eight digits.
    """
    z = normal_quantile(level)
    if df > 200:
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / df + g2 / df**2 + g3 / df**3
    low, high = 0.0, math.pi / 2  # the angle atan(t / sqrt(df)) has bounds, t has none
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_two_sided(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_two_sided(angle: float, df: int) -> float:
    """P(|T| < t) with `angle` = atan(t / sqrt(df))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(df // 2):
        total += term
        term *= cosine**2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def wilson(successes: float, total: float, level: float = LEVEL) -> Estimate | None:
    """Wilson's score interval of a proportion (Wilson 1927); None without trials.

    `successes` may be fractional: a tie counts as half a success.
    """
    if total <= 0:
        return None
    share, z2 = successes / total, normal_quantile(level) ** 2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * share * (1 - share) / total + z2**2 / (4 * total**2)) / (1 + z2 / total)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def wilson_of_means(
    means: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    level: float = LEVEL,
) -> Estimate | None:
    """Wilson interval of the mean of independent values between 0 and 1; None without values.

    `means` (n,): one value for each independent unit, for example the mean over the labelers who
    judged an item. `weights` (n,): how many units have the value. The interval is Wilson's with
    the effective sample size p (1 - p) / var(mean), as for complex surveys (Korn and Graubard
    1998; Franco et al. 2019). With values of 0 and 1 only it is Wilson's exactly;
    fractional values (ties, several labelers) vary less, so the effective size is larger.
    When the units do not vary at all, the effective size is their number.
    """
    values = np.asarray(means, dtype=float)
    counts = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    total = float(counts.sum())
    if total <= 0:
        return None
    mean = min(1.0, max(0.0, float(values @ counts) / total))
    variance = float((values - mean) ** 2 @ counts) / total
    binomial = mean * (1 - mean)
    size = total * binomial / variance if variance > 1e-12 and binomial > 0 else total
    return wilson(mean * size, size, level)


def unit_means(units: Iterable[Hashable], values: Iterable[float]) -> np.ndarray:
    """The mean of `values` within each unit, (number of units,), in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    found = [numbers.setdefault(unit, len(numbers)) for unit in units]
    return means_of_units(np.array(found, dtype=np.intp), np.array([*values], dtype=float))


def means_of_units(units: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the values (n,) within each unit, in order of its number; units (n,)."""
    numbers = np.bincount(units)
    present = numbers > 0
    return np.bincount(units, values, len(numbers))[present] / numbers[present]


def resampled_weights(
    weights: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Bootstrap samples of units that are stored as distinct kinds with counts.

    weights (k,): number of units of each kind. Returns (resamples, k): each row is the number of
    units of each kind in a sample of n = sum(weights) units drawn with replacement. Units of a
    kind are alike, so this multinomial draw equals resampling the n units one by one.
    """
    total = int(weights.sum())
    return generator.multinomial(total, weights / total, size=resamples).astype(float)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    weights: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float, int] | None:
    """Percentile bootstrap interval (Efron 1979) over units stored as kinds with counts.

    `statistic` maps weights (r, k) to values (r,), nan where it is undefined. Returns the two ends
    and the number of undefined resamples, which the ends leave out; None if all are undefined.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, min(resamples, 4_000_000 // max(1, len(weights))))  # 32 MB at a time
    parts = []
    for first in range(0, resamples, rows):
        drawn = resampled_weights(weights, min(rows, resamples - first), generator)
        parts.append(statistic(drawn))
    values = np.concatenate(parts)
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), len(values) - len(defined)
