"""Agreement of raters: with each other, with themselves and with gold answers.

`AgreementCounts` keeps what all figures of a project need in a table that stays small: how many
items have each distinct vector of counts ("two said A, one said tie"). The database updates it
with each response, stores it as JSON and reads every figure from it without going through the
responses again.

Values must name the candidates, not the sides of the screen: where the sides are shown in random
order, "left" of one rater is "right" of another.
"""

from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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
    more. The table holds no rater and no item, so a caller must give each rater's one valid
    judgement of an item: repeats go to `self_agreement`.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._places = {category: i for i, category in enumerate(self.categories)}
        if len(self._places) < 2 or len(self._places) < len(self.categories):
            raise ValueError(f"categories must be two or more, each once: {self.categories}")
        self._items: Counter[Counts] = Counter()

    @property
    def empty(self) -> Counts:
        """The counts of an item that nobody has judged."""
        return (0,) * len(self.categories)

    def add(self, before: Counts, value: Category) -> Counts:
        """Counts a new judgement of an item that has the counts `before`; returns its new ones."""
        return self._change(before, value, 1)

    def remove(self, before: Counts, value: Category) -> Counts:
        """Takes a judgement back, for example one that was deleted or superseded."""
        return self._change(before, value, -1)

    def _change(self, before: Counts, value: Category, step: int) -> Counts:
        place = self._place(value)
        after = (*before[:place], before[place] + step, *before[place + 1 :])
        self.replace(before, after)
        return after

    def _place(self, value: Category) -> int:
        if value not in self._places:
            raise ValueError(f"value {value!r} is none of the categories {self.categories}")
        return self._places[value]

    def replace(self, before: Counts, after: Counts) -> None:
        """Moves one item from the counts `before` to the counts `after`."""
        self._check(before)
        self._check(after)
        if any(before) and not self._items[before]:
            raise ValueError(f"no item has the counts {before}; the table and its items differ")
        for counts, step in ((before, -1), (after, 1)):
            if any(counts):
                self._items[counts] += step
            if not self._items[counts]:
                del self._items[counts]

    def _check(self, counts: Counts) -> None:
        if len(counts) != len(self.categories) or min(counts) < 0:
            raise ValueError(f"counts {counts} do not fit the categories {self.categories}")

    def merge(self, other: "AgreementCounts") -> None:
        """Adds the items of another table, which must be other items with the same categories."""
        if other.categories != self.categories:
            raise ValueError(f"categories differ: {self.categories} and {other.categories}")
        self._items.update(other._items)

    @classmethod
    def from_judgements(
        cls,
        categories: Sequence[Category],
        judgements: Iterable[tuple[Hashable, Hashable, Category]],
    ) -> "AgreementCounts":
        """Counts (item, rater, value) in any order. ValueError if a rater judged an item twice."""
        seen: set[tuple[Hashable, Hashable]] = set()

        def once() -> Iterator[tuple[Hashable, Category, int]]:
            for item, rater, value in judgements:
                if (item, rater) in seen:
                    raise ValueError(
                        f"rater {rater!r} judged item {item!r} twice; keep one judgement here and "
                        "give repeats to self_agreement"
                    )
                seen.add((item, rater))
                yield item, value, 1

        return cls.from_item_counts(categories, once())

    @classmethod
    def from_item_counts(
        cls, categories: Sequence[Category], rows: Iterable[tuple[Hashable, Category, int]]
    ) -> "AgreementCounts":
        """Counts (item, value, number of raters), as a database sums them, in any order."""
        table = cls(categories)
        items: dict[Hashable, list[int]] = {}
        for item, value, number in rows:
            counts = items.get(item)
            if counts is None:
                counts = items[item] = [0] * len(table.categories)
            counts[table._place(value)] += number
        table._items.update(tuple(counts) for counts in items.values() if any(counts))
        return table

    def to_json(self) -> dict[str, Any]:
        rows = [[*counts, number] for counts, number in sorted(self._items.items())]
        return {"categories": list(self.categories), "items": rows}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "AgreementCounts":
        table = cls(stored["categories"])
        for *counts, number in stored["items"]:
            table._check(tuple(counts))
            table._items[tuple(counts)] += number
        return table

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
            kept = list(table.empty)
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
        categories. Wilson's interval of raw agreement takes the items as independent units.
        """
        if scale == "interval" and not all(isinstance(c, int | float) for c in self.categories):
            raise ValueError(f"an interval scale needs numbers as categories: {self.categories}")
        patterns, weights = self.arrays()
        sizes = patterns.sum(axis=1)
        totals = weights @ patterns
        paired = sizes >= 2
        equal = pairwise_agreement(patterns[paired], np.eye(len(self.categories)))
        judgements = int(totals.sum())
        return AgreementFigures(
            items=int(weights.sum()),
            paired_items=int(weights[paired].sum()),
            judgements=judgements,
            shares={
                c: n / max(1, judgements)
                for c, n in zip(self.categories, totals.tolist(), strict=True)
            },
            raw=wilson_of_means(equal, weights[paired], level),
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
    """How often answers equal what they are compared with, over all raters and for each."""

    overall: Estimate | None
    by_rater: dict[Hashable, Estimate]
    comparisons: dict[Hashable, int]


def self_agreement(
    repeats: Iterable[tuple[Hashable, Category, Category]], level: float = LEVEL
) -> MatchRates:
    """Agreement of raters with themselves on repeated items: (rater, first answer, later answer).

    Wilson intervals; the overall one is about these raters, not about raters in general.
    """
    return _match_rates(((rater, first == again) for rater, first, again in repeats), level)


def gold_agreement(
    answers: Iterable[tuple[Hashable, Category, Category]], level: float = LEVEL
) -> MatchRates:
    """Agreement of raters with gold answers: (rater, answer, gold answer). Wilson intervals."""
    return _match_rates(((rater, answer == gold) for rater, answer, gold in answers), level)


def _match_rates(matches: Iterable[tuple[Hashable, bool]], level: float) -> MatchRates:
    right: Counter[Hashable] = Counter()
    total: Counter[Hashable] = Counter()
    for rater, match in matches:
        right[rater] += match
        total[rater] += 1
    rates = {rater: wilson(right[rater], number, level) for rater, number in total.items()}
    return MatchRates(
        overall=wilson(sum(right.values()), sum(total.values()), level),
        by_rater={rater: rate for rater, rate in rates.items() if rate is not None},
        comparisons=dict(total),
    )


def agreement_by_rater(
    judgements: Iterable[tuple[Hashable, Hashable, Category]],
    among: Container[Hashable] | None = None,
    level: float = LEVEL,
) -> MatchRates:
    """Agreement of each rater with the others of the same item; (item, rater, value) BY ITEM.

    The judgements of an item must follow each other, as ORDER BY item gives them; they are read
    once and not kept. `among` are the raters to agree with, for example the people, so that a
    model as judge is measured against people only; None: all. A rater's figure is the mean over
    items of the share of these other raters who gave the same value; Wilson's interval takes the
    items as independent units. `overall` is None: the items of raters overlap, see
    `AgreementCounts.figures`.
    """
    shares: dict[Hashable, Counter[float]] = {}
    for _, group in groupby(judgements, key=lambda judgement: judgement[0]):
        given = [(rater, value) for _, rater, value in group]
        counts = Counter(value for rater, value in given if among is None or rater in among)
        for rater, value in given:
            own = among is None or rater in among
            others = counts.total() - own
            if others:
                shares.setdefault(rater, Counter())[(counts[value] - own) / others] += 1
    rates = {rater: wilson_of_means([*of], [*of.values()], level) for rater, of in shares.items()}
    return MatchRates(
        overall=None,
        by_rater={rater: rate for rater, rate in rates.items() if rate is not None},
        comparisons={rater: sum(of.values()) for rater, of in shares.items()},
    )
