"""Gwet's AC1 and AC2, agreement beyond chance that stays steady when one answer dominates.

Sources: Kilem L. Gwet, "Computing inter-rater reliability and its variance in the presence of high
agreement", British Journal of Mathematical and Statistical Psychology 61 (2008), and "Handbook of
Inter-Rater Reliability", 4th edition (2014), chapters 2 to 5.

When nearly all judgements are one category, kappa and alpha fall towards 0 although nearly all
raters agree: chance is estimated as if everybody guessed by the margins. AC1 estimates that only
the hard items are guessed. Report both: alpha asks how well the items are told apart, AC1 how
often raters agree beyond guesses.

Shapes: `patterns` (k, c) is the distinct count vectors over c categories; `weights` (k,) how many
items have each of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from openpalm.feedback.statistics.alpha import Scale
from openpalm.feedback.statistics.intervals import LEVEL, t_quantile


class Gwet(NamedTuple):
    """AC1 (nominal) or AC2 (ordinal, interval) with standard error and interval."""

    value: float
    standard_error: float
    low: float
    high: float


def agreement_weights(categories: Sequence[object], scale: Scale) -> np.ndarray:
    """How far two categories agree, 1 on the diagonal, (c, c) (Handbook, chapter 3).

    nominal: equal or not (AC1). ordinal: 1 - C(|k - l| + 1, 2) / C(c, 2), by position in the
    order. interval: quadratic, 1 - (x_k - x_l)^2 / (x_max - x_min)^2, by the categories' numbers.
    """
    if scale == "nominal":
        return np.eye(len(categories))
    if scale == "interval":
        numbers = np.array(categories, dtype=float)
        return 1 - (numbers[:, None] - numbers) ** 2 / (numbers.max() - numbers.min()) ** 2
    steps = np.abs(np.subtract.outer(np.arange(len(categories)), np.arange(len(categories))))
    return 1 - (steps * (steps + 1)) / (len(categories) * (len(categories) - 1))


def pairwise_agreement(patterns: np.ndarray, credit: np.ndarray) -> np.ndarray:
    """Share of an item's pairs of judgements that agree, (k,); nan below two judgements.

    `credit` (c, c) is the agreement of two categories (Handbook, chapter 2).
    """
    judgements = patterns.sum(axis=1)
    agreeing = (patterns * (patterns @ credit - 1)).sum(axis=1)
    pairs = judgements * (judgements - 1)
    undefined = np.full(len(patterns), np.nan)
    return np.divide(agreeing, pairs, where=pairs > 0, out=undefined)


def gwet(
    patterns: np.ndarray,
    weights: np.ndarray,
    categories: Sequence[object],
    scale: Scale = "nominal",
    *,
    level: float = LEVEL,
) -> Gwet | None:
    """AC1 of a nominal scale, AC2 of an ordinal or interval scale; None without a pair.

    Items with a single judgement enter the margins only. The standard error is that of items as
    a sample of a large population (2008; Handbook, chapter 5); the interval uses
    Student's t with n - 1 degrees of freedom and ends at 1. `categories` are all that a rater
    could choose, also those that nobody chose: AC1 depends on their number.
    """
    judged = patterns.sum(axis=1) >= 1
    patterns, weights = patterns[judged].astype(float), weights[judged].astype(float)
    paired = patterns.sum(axis=1) >= 2
    items, paired_items = weights.sum(), weights[paired].sum()
    if not paired_items or items < 2:
        return None
    credit = agreement_weights(categories, scale)
    agreement = np.nan_to_num(pairwise_agreement(patterns, credit))
    shares = patterns / patterns.sum(axis=1, keepdims=True)
    margins = weights @ shares / items
    # Chance: the probability of a guess times the agreement of two guesses.
    scatter = credit.sum() / (len(categories) * (len(categories) - 1))
    chance = scatter * float(margins @ (1 - margins))
    observed = float(weights[paired] @ agreement[paired]) / paired_items
    value = (observed - chance) / (1 - chance)
    # Linearised contribution of each item to the coefficient.
    part = items / paired_items * paired * (agreement - chance) / (1 - chance)
    moved = 2 * (1 - value) * (scatter * (shares @ (1 - margins)) - chance) / (1 - chance)
    variance = float(weights @ (part - moved - value) ** 2) / (items * (items - 1))
    error = math.sqrt(variance)
    half = t_quantile(int(items) - 1, level) * error
    return Gwet(value, error, value - half, min(1.0, value + half))
