"""What the counted judgements say, as arrays: one value of each, summed by item."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from openpalm.feedback.judgements.categories import BOTH_BAD
from openpalm.feedback.quality.response_table import NONE, ResponseTable
from openpalm.feedback.statistics.agreement import Category

STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)
CATEGORIES: dict[str, tuple[Category, ...]] = {
    "compare": (*STRENGTHS, BOTH_BAD),
    "thumb": (0, 1),
    "rank": ("a", "tie", "b"),
    "rate": (1, 2, 3, 4, 5),
}
"""the values that a judgement, or a part of it, can have, by kind"""
WINNERS: dict[Category, Category] = {
    **dict.fromkeys(STRENGTHS[:3], "a"),
    0: "tie",
    **dict.fromkeys(STRENGTHS[4:], "b"),
    BOTH_BAD: "both_bad",
}
"""category of a comparison -> outcome; a is candidate 0"""
OUTCOMES: tuple[Category, ...] = ("a", "b", "tie", "both_bad")


@dataclass(frozen=True)
class Values:
    """Values of n judgements. A ranking has one for each pair of answers, a rating for each axis,
    other judgements have one; the values of one item and part are a unit and can be compared."""

    unit_items: np.ndarray
    """the item of each unit, ascending, (units,)"""
    unit_parts: np.ndarray
    """indices in `ResponseTable.parts`; 0 where a judgement has one value"""
    units: np.ndarray
    """the unit of each value, (n,)"""
    raters: np.ndarray
    """indices in `ResponseTable.raters`"""
    codes: np.ndarray
    """indices in the categories"""
    categories: tuple[Category, ...]

    @cached_property
    def counts(self) -> np.ndarray:
        """How many values of each unit have each category, (units, categories)."""
        shape = len(self.unit_items), len(self.categories)
        flat = self.units * shape[1] + self.codes
        return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def values_of(table: ResponseTable, *author_kinds: str) -> Values:
    """The values of the judgements of these kinds of authors that figures count."""
    return table.kept(frozenset(author_kinds), lambda: _read(table, author_kinds))


def _read(table: ResponseTable, author_kinds: tuple[str, ...]) -> Values:
    counts = table.counted(*author_kinds)
    rows, categories = table.rows, CATEGORIES.get(table.kind, (0,))
    if table.kind in ("rank", "rate"):
        found = table.values[counts[table.places(table.values["row"])]]
        at, parts, codes = table.places(found["row"]), found["part"], found["value"]
        if table.kind == "rate":
            codes = _code_of(categories)[codes]
    else:
        at = np.flatnonzero(counts & (rows["category"] != NONE))
        parts = np.zeros(len(at), np.int16)
        codes = _code_of(categories)[rows["category"][at]]
    most = int(parts.max(initial=0)) + 1
    keys, units = np.unique(rows["item"][at] * most + parts, return_inverse=True)
    return Values(*np.divmod(keys, most), units, rows["rater"][at], codes, categories)


def _code_of(categories: tuple[Category, ...]) -> np.ndarray:
    """Index of each category, by its number; negative ones count from the end, as Python's."""
    codes = np.zeros(2 * BOTH_BAD + 1, np.int8)
    for n, category in enumerate(categories):
        codes[int(category)] = n
    return codes


def winners(values: Values) -> Values:
    """The outcomes of comparisons, without their strength."""
    of = np.array([OUTCOMES.index(WINNERS[one]) for one in values.categories], np.int8)
    return replace(values, codes=of[values.codes], categories=OUTCOMES)
