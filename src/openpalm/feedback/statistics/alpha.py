"""Krippendorff's alpha from counts of values per item, with a bootstrap interval over items.

Source: Klaus Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). Any number of
raters, missing judgements, nominal, ordinal and interval values. Who judged does not enter alpha,
so an item is its counts: how many raters gave each category. Items with the same counts are added
up, which makes a million judgements a small table.

Shapes: `patterns` (k, c) is the distinct count vectors over c categories; `weights` (..., k) how
many items have each of them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from openpalm.feedback.statistics.intervals import LEVEL, bootstrap

Scale = Literal["nominal", "ordinal", "interval"]


class Alpha(NamedTuple):
    """Alpha with its interval. 1: perfect agreement; 0: what chance gives; below: worse."""

    value: float
    low: float
    high: float
    undefined_resamples: int
    """bootstrap samples in which all judgements were the same category; not in the interval"""


def alpha(
    patterns: np.ndarray,
    weights: np.ndarray,
    categories: Sequence[object],
    scale: Scale = "nominal",
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> Alpha | None:
    """Krippendorff's alpha, or None where it is undefined.

    It is undefined if no item has two judgements or all judgements are the same category: without
    variation nothing shows that raters can tell the categories apart.

    The interval is a percentile bootstrap that resamples items (Zapf et al. 2016, "Measuring
    inter-rater reliability for nominal data", BMC Medical Research Methodology 16:93).
    Krippendorff's own bootstrap resamples pairs of judgements as if they were independent, which
    those of one item are not.
    """
    pairable = patterns.sum(axis=1) >= 2
    patterns, weights = patterns[pairable].astype(float), weights[pairable]
    if not len(weights):
        return None
    positions = np.array(categories, dtype=float) if scale == "interval" else scale
    tables = coincidences(patterns).reshape(len(patterns), -1)

    def of_weights(drawn: np.ndarray) -> np.ndarray:
        return alpha_of_coincidences((drawn @ tables).reshape(-1, *_square(patterns)), positions)

    value = float(of_weights(weights[None].astype(float))[0])
    if np.isnan(value):
        return None
    ends = bootstrap(of_weights, weights, resamples=resamples, seed=seed, level=level)
    return Alpha(value, *(ends or (value, value, resamples)))


def _square(patterns: np.ndarray) -> tuple[int, int]:
    return patterns.shape[1], patterns.shape[1]


def coincidences(patterns: np.ndarray) -> np.ndarray:
    """Coincidence matrix of one item of each pattern (2011, section C), (k, c, c).

    Each ordered pair of judgements of an item with m judgements counts 1 / (m - 1), so that an
    item counts as many times as it has judgements.
    """
    judgements = patterns.sum(axis=1)[:, None, None]
    pairs = patterns[:, :, None] * patterns[:, None, :]
    diagonal = np.arange(patterns.shape[1])
    pairs[:, diagonal, diagonal] -= patterns
    return pairs / (judgements - 1)


def alpha_of_coincidences(tables: np.ndarray, scale: np.ndarray | str) -> np.ndarray:
    """Alpha of coincidence matrices (r, c, c) -> (r,); nan where only one category occurs.

    alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck (2011, section D), with o the coincidences,
    n_c their row sums, n their total and d the squared differences of the scale.
    """
    margins = tables.sum(axis=2)
    total = margins.sum(axis=1)
    difference = squared_differences(margins, scale)
    observed = (tables * difference).sum(axis=(1, 2))
    expected = (margins[:, :, None] * margins[:, None, :] * difference).sum(axis=(1, 2))
    defined = expected > 0
    ratio = np.divide((total - 1) * observed, expected, where=defined, out=np.zeros(len(total)))
    return np.where(defined, 1 - ratio, np.nan)


def squared_differences(margins: np.ndarray, scale: np.ndarray | str) -> np.ndarray:
    """Squared differences between categories (2011, section D): (c, c), or (r, c, c) if ordinal.

    `scale` is "nominal", "ordinal", or the numbers (c,) of the categories of an interval scale.
    margins (r, c): how often each category occurs. Ordinal differences are the number of values
    that separate two categories, so they depend on the margins.
    """
    if isinstance(scale, np.ndarray):
        return (scale[:, None] - scale[None, :]) ** 2
    if scale == "nominal":
        return 1 - np.eye(margins.shape[1])
    # The sum of n_g for g from c to k, less half of both ends, is a difference of mid-ranks.
    ranks = np.cumsum(margins, axis=1) - margins / 2
    return (ranks[:, :, None] - ranks[:, None, :]) ** 2
