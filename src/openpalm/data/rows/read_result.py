"""The result of reading a file of rows: usable items, unused rows with reasons, unused fields.

Every verb that reads rows reports unused rows in the same words, with line numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from openpalm.base.console import shown
from openpalm.errors import DataError

T = TypeVar("T")
U = TypeVar("U")

MAX_LISTED = 8
"""Line numbers, or names of fields, in one message."""
MAX_REASONS = 200
"""Reasons that are counted one by one; a hostile file could have one for each row."""
OTHER_REASONS = "other reasons"
_NONE: Mapping[str, Any] = MappingProxyType({})


class UnusableRow(DataError):
    """A row of a known format that gives no example: readers skip it and count its `reason`.

    `message` is the error text for callers that cannot skip a row.
    """

    def __init__(self, reason: str, message: str | None = None):
        super().__init__(message or f"{reason}; correct this row or leave it out")
        self.reason = reason


class TiedRow(UnusableRow):
    """Two completions judged equally good: no pair, but a tie for agreement figures.

    `row` holds the fields of a pair.
    """

    def __init__(self, row: Mapping[str, Any]):
        super().__init__("tie")
        self.row = dict(row)


class ReadResult(NamedTuple, Generic[T]):
    """The usable items of a file, and a count of everything unused for each reason.

    An unusable row counts once; so does each unusable pair or completion inside a row.
    """

    items: list[T]
    unused: dict[str, int]
    """how many were not used, by reason"""
    places: Sequence[str] = ()
    """the origin of each item ("path:line"); empty if unknown"""
    unused_places: Mapping[str, Sequence[str]] = _NONE
    """the origins of what was not used, by reason"""
    unused_fields: Mapping[str, int] = _NONE
    """how many rows carry an unused field, by its name"""

    def map(self, make: Callable[[T], U | str]) -> "ReadResult[U]":
        """Replaces each item by `make(item)`; a string is a reason to drop the item."""
        places = self.places or [""] * len(self.items)
        made = collect_results(zip(places, map(make, self.items), strict=True))
        reasons = dict.fromkeys([*self.unused, *made.unused])
        return ReadResult(
            made.items,
            {r: self.unused.get(r, 0) + made.unused.get(r, 0) for r in reasons},
            made.places,
            {r: [*self.unused_places.get(r, ()), *made.unused_places.get(r, ())] for r in reasons},
            self.unused_fields,
        )

    def first(self, count: int) -> "ReadResult[T]":
        """At most `count` of the items."""
        return self._replace(items=self.items[:count], places=self.places[:count])

    def report(self) -> list[str]:
        """One line for each reason, and one line for the unused fields."""
        lines = [
            f"{count} left out: {reason}{self._lines_of(reason, ' (', ')')}"
            for reason, count in self.unused.items()
        ]
        if self.unused_fields:
            counted = [f"{shown(name)} ({count})" for name, count in self.unused_fields.items()]
            more = [f"{len(counted) - MAX_LISTED} more"] if len(counted) > MAX_LISTED else []
            names = ", ".join(counted[:MAX_LISTED] + more)
            # A lower bound for the rows: two fields may be in the same rows or in different ones.
            rows = max(self.unused_fields.values())
            carry = "row carries" if rows == 1 else "rows carry"
            lines.append(f"{rows} {carry} fields that are not used: {names}")
        return lines

    def refuse_empty(self, path: object, what: str) -> None:
        """Raises DataError with the reasons if there is no usable item."""
        if not self.items:
            reasons = ", ".join(
                f"{reason} ({count}{self._lines_of(reason, '; ')})"
                for reason, count in self.unused.items()
            )
            raise DataError(f"{path}: no {what} can be used: {reasons or 'it holds none'}")

    def _lines_of(self, reason: str, before: str, after: str = "") -> str:
        """The first few line numbers for a reason; empty if the places are unknown."""
        places = self.unused_places.get(reason, ())
        numbers = list(dict.fromkeys(place.rpartition(":")[2] for place in places if place))
        if not numbers:
            return ""
        more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
        lines = "line" if len(numbers) == 1 else "lines"
        return f"{before}{lines} {', '.join(numbers[:MAX_LISTED])}{more}{after}"


def collect_results(found: Iterable[tuple[str, T | str]]) -> ReadResult[T]:
    """A ReadResult of (place, item or reason) tuples; a string is a reason."""
    items: list[T] = []
    places: list[str] = []
    unused_places: dict[str, list[str]] = {}
    for place, item in found:
        if isinstance(item, str):
            unused_places.setdefault(item, []).append(place)
        else:
            items.append(item)
            places.append(place)
    unused = {reason: len(where) for reason, where in unused_places.items()}
    return ReadResult(items, unused, places, unused_places)


@dataclass
class StreamCounts:
    """Counts what a stream of rows uses and leaves out, in bounded memory.

    For streams that are too long for a ReadResult, which keeps every item and every place.
    """

    used: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    """how many were not used, by reason"""
    altered: Counter[str] = field(default_factory=Counter)
    """how many were used but not as they were, by what was changed"""
    places: dict[str, list[str]] = field(default_factory=dict)
    """the first MAX_LISTED places of what was not used or altered"""

    def leave_out(self, place: str, reason: str) -> None:
        self._add(self.unused, place, reason)

    def alter(self, place: str, change: str) -> None:
        self._add(self.altered, place, change)

    def report(self) -> list[str]:
        """One line for each reason and for each change."""
        return [
            f"{count} {verb}: {reason}{self._listed(reason, count)}"
            for verb, counts in (("left out", self.unused), ("altered", self.altered))
            for reason, count in counts.items()
        ]

    def _add(self, counts: Counter[str], place: str, reason: str) -> None:
        if reason not in counts and len(counts) >= MAX_REASONS:
            reason = OTHER_REASONS
        counts[reason] += 1
        listed = self.places.setdefault(reason, [])
        if place and place not in listed and len(listed) < MAX_LISTED:
            listed.append(place)

    def _listed(self, reason: str, count: int) -> str:
        listed = [shown(place) for place in self.places.get(reason, ())]
        more = ", ..." if listed and count > len(listed) else ""
        return f" ({', '.join(listed)}{more})" if listed else ""
