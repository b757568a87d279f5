"""Agreement of raters: with each other, with themselves and with gold answers.

`AgreementCounts` has what all figures of a project need in a table that stays small: how many items
have each distinct vector of counts ("two said A, one said tie").

Values must name the candidates, not the sides of the screen: where the sides are shown in random
order, "left" of one rater is "right" of another.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from openpalm.feedback.statistics.alpha import Alpha, Scale, alpha
from openpalm.feedback.statistics.gwet import Gwet, gwet, pairwise_agreement
from openpalm.feedback.statistics.intervals import LEVEL, Estimate, wilson, wilson_of_means

Category = str | int | float
Counts = tuple[int, ...]
"""of one item: how many raters gave each category, in the order of the categories"""


class Judgement(NamedTuple):
    item: Hashable
    rater: Hashable
    value: Category


@dataclass(frozen=True, slots=True)
class AgreementFigures:
    """What a page shows of agreement between raters; None where it is undefined."""

    items: int
    """items with a judgement"""
    paired_items: int
    """items with two or more judgements; only these tell of agreement"""
    judgements: int
    shares: dict[Category, float]
    """share of each category among the judgements"""
    raw: Estimate | None
    """probability that two raters of an item give the same category, averaged over items"""
    alpha: Alpha | None
    gwet: Gwet | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `shares` become pairs, because a category may be a number."""
        named = {name: getattr(self, name) for name in ("raw", "alpha", "gwet")}
        return {
            "items": self.items,
            "paired_items": self.paired_items,
            "judgements": self.judgements,
            "shares": [[category, share] for category, share in self.shares.items()],
        } | {name: figure and figure._asdict() for name, figure in named.items()}


class AgreementCounts:
    """Number of items with each vector of counts over `categories`.

    The categories are all values that a rater can choose, in order if the scale has one; two or
    more. The table holds no rater and no item, so a caller must count one judgement of each rater
    of an item: repeats go to `match_rates`.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._places = {category: i for i, category in enumerate(self.categories)}
        if len(self._places) < 2 or len(self._places) < len(self.categories):
            raise ValueError(f"categories must be two or more, each once: {self.categories}")
        self._items: Counter[Counts] = Counter()

    def _place(self, value: Category) -> int:
        if value not in self._places:
            raise ValueError(f"value {value!r} is none of the categories {self.categories}")
        return self._places[value]

    @classmethod
    def of_items(cls, categories: Sequence[Category], items: Iterable[Counts]) -> "AgreementCounts":
        """The table of items from the counts of each; those without a judgement are left out."""
        table = cls(categories)
        table._items.update(counts for counts in items if any(counts))
        for counts in table._items:
            if len(counts) != len(table.categories) or min(counts) < 0:
                raise ValueError(f"counts {counts} do not fit the categories {table.categories}")
        return table

    @classmethod
    def of_patterns(
        cls, categories: Sequence[Category], patterns: np.ndarray, numbers: np.ndarray
    ) -> "AgreementCounts":
        """The table from distinct vectors of counts (k, c) and the number of items of each (k,)."""
        table = cls(categories)
        for counts, number in zip(patterns.tolist(), numbers.tolist(), strict=True):
            if any(counts):
                table._items[tuple(counts)] += number
        return table

    def merge(self, other: "AgreementCounts") -> None:
        """Adds the items of another table, which must be other items with the same categories."""
        if other.categories != self.categories:
            raise ValueError(f"categories differ: {self.categories} and {other.categories}")
        self._items.update(other._items)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AgreementCounts)
            and self.categories == other.categories
            and self._items == other._items
        )

    def regrouped(self, groups: Mapping[Category, Category]) -> tuple["AgreementCounts", int]:
        """The table of other categories, and how many judgements it leaves out.

        `groups` names the new category of each old one; categories without one are left out. For
        agreement about the winner of a scale with strengths, {-2: "a", -1: "a", 0: "tie", ...}, or
        for an ordinal figure of a scale where "both bad" is outside the order. The new categories
        are in order of first mention.
        """
        table = AgreementCounts(tuple(dict.fromkeys(groups.values())))
        moves = [(self._place(old), table._place(new)) for old, new in groups.items()]
        left_out = 0
        for counts, number in self._items.items():
            kept = [0] * len(table.categories)
            for place, to in moves:
                kept[to] += counts[place]
            left_out += number * (sum(counts) - sum(kept))
            if any(kept):
                table._items[tuple(kept)] += number
        return table, left_out

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct vectors of counts (k, c) and the number of items with each (k,)."""
        ordered = sorted(self._items.items())
        patterns = np.array([counts for counts, _ in ordered], dtype=np.int64)
        weights = np.array([number for _, number in ordered], dtype=np.int64)
        return patterns.reshape(len(ordered), len(self.categories)), weights

    def raw(self, level: float = LEVEL) -> Estimate | None:
        """Agreement of equal categories; Wilson's interval takes the items as independent units."""
        patterns, weights = self.arrays()
        paired = patterns.sum(axis=1) >= 2
        equal = pairwise_agreement(patterns[paired], np.eye(len(self.categories)))
        return wilson_of_means(equal, weights[paired], level)

    def figures(
        self,
        scale: Scale = "nominal",
        *,
        resamples: int = 1000,
        seed: int = 0,
        level: float = LEVEL,
    ) -> AgreementFigures:
        """Raw agreement, Krippendorff's alpha and Gwet's AC1 or AC2, each with its interval.

        Raw agreement is of equal categories on every scale. An interval scale needs numbers as
        categories.
        """
        if scale == "interval" and not all(isinstance(c, int | float) for c in self.categories):
            raise ValueError(f"an interval scale needs numbers as categories: {self.categories}")
        patterns, weights = self.arrays()
        totals = weights @ patterns
        paired = patterns.sum(axis=1) >= 2
        judgements = int(totals.sum())
        return AgreementFigures(
            items=int(weights.sum()),
            paired_items=int(weights[paired].sum()),
            judgements=judgements,
            shares={
                c: n / max(1, judgements)
                for c, n in zip(self.categories, totals.tolist(), strict=True)
            },
            raw=self.raw(level),
            alpha=alpha(
                patterns,
                weights,
                self.categories,
                scale,
                resamples=resamples,
                seed=seed,
                level=level,
            ),
            gwet=gwet(patterns, weights, self.categories, scale, level=level),
        )


@dataclass(frozen=True, slots=True)
class MatchRates:
    """How often the answers of each rater equal what they are compared with."""

    by_rater: dict[Any, Estimate]
    comparisons: dict[Any, int]


def match_rates(matches: Iterable[tuple[Hashable, bool]], level: float = LEVEL) -> MatchRates:
    """Share of matches of each rater, with gold answers or with their own on repeated items.

    Wilson intervals.
    """
    right: Counter[Hashable] = Counter()
    total: Counter[Hashable] = Counter()
    for rater, match in matches:
        right[rater] += match
        total[rater] += 1
    rates = {rater: wilson(right[rater], number, level) for rater, number in total.items()}
    return MatchRates(
        by_rater={rater: rate for rater, rate in rates.items() if rate is not None},
        comparisons=dict(total),
    )


def agreement_by_rater(
    units: np.ndarray,
    raters: np.ndarray,
    codes: np.ndarray,
    among: np.ndarray | None = None,
    level: float = LEVEL,
) -> MatchRates:
    """Agreement of each rater with the others of the same unit.

    Arrays (n,) of judgements: unit (an item, or a part of one), rater and value, each numbered
    from 0. `among` (raters,) are the raters to agree with, for example the people, so that a model
    as judge is measured against people only; None: all. A rater's figure is the mean over units
    of the share of these other raters who gave the same value; Wilson's interval takes the units
    as independent.
    """
    own = np.ones(len(units), bool) if among is None else among[raters]
    size = int(units.max(initial=-1)) + 1, int(codes.max(initial=0)) + 1
    cells = units * size[1] + codes
    counts = np.bincount(cells[own], minlength=size[0] * size[1])
    others = counts.reshape(size).sum(axis=1)[units] - own
    paired = others > 0
    if not paired.any():
        return MatchRates({}, {})
    shares = (counts[cells] - own)[paired] / others[paired]
    order = np.argsort(raters[paired], kind="stable")
    found, starts = np.unique(raters[paired][order], return_index=True)
    of_raters = dict(zip(found.tolist(), np.split(shares[order], starts[1:]), strict=True))
    rates = {rater: wilson_of_means(of, level=level) for rater, of in of_raters.items()}
    return MatchRates(
        by_rater={rater: rate for rater, rate in rates.items() if rate is not None},
        comparisons={rater: len(of) for rater, of in of_raters.items()},
    )
