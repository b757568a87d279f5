"""What a file of rows gives: the usable items, what was left out and why, the fields not used.

Every verb that reads rows counts and reports in the same words, with line numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from openpalm.base.console import shown
from openpalm.errors import DataError

T = TypeVar("T")
U = TypeVar("U")

MAX_LISTED = 8
"""Lines, or names of fields, in one message."""
_NONE: Mapping[str, Any] = MappingProxyType({})


class UnusableRow(DataError):
    """A row in a known form that teaches nothing: it is left out and counted under `reason`.

    The text is for callers who cannot leave it out.
    """

    def __init__(self, reason: str, message: str | None = None):
        super().__init__(message or f"{reason}; correct this row or leave it out")
        self.reason = reason


class TiedRow(UnusableRow):
    """Two answers that were judged equally good: no pair, but a tie for whoever counts those.

    `row` is in the form of a pair.
    """

    def __init__(self, row: Mapping[str, Any]):
        super().__init__("tie")
        self.row = dict(row)


class ReadResult(NamedTuple, Generic[T]):
    """What an algorithm can use, and how much it cannot use, by reason.

    A row or record that cannot be used counts once, and so does each pair or answer in it.
    """

    items: list[T]
    unused: dict[str, int]
    places: Sequence[str] = ()
    """where each item comes from ("path:line"); empty where nobody knows"""
    unused_places: Mapping[str, Sequence[str]] = _NONE
    """where the unused ones come from, by reason"""
    unused_fields: Mapping[str, int] = _NONE
    """rows that carry a field that is not used, by its name"""

    def map(self, make: Callable[[T], U | str]) -> "ReadResult[U]":
        """What `make` gives for each item; a text is the reason for leaving it out."""
        made = [make(item) for item in self.items]
        places = self.places or [""] * len(made)
        found = collect_results(zip(places, made, strict=True))
        unused = {r: self.unused.get(r, 0) + found.unused.get(r, 0) for r in _both(self, found)}
        unused_places = {
            r: [*self.unused_places.get(r, ()), *found.unused_places.get(r, ())]
            for r in _both(self, found)
        }
        return ReadResult(found.items, unused, found.places, unused_places, self.unused_fields)

    def first(self, count: int) -> "ReadResult[T]":
        """At most `count` of the items."""
        return self._replace(items=self.items[:count], places=self.places[:count])

    def report(self) -> list[str]:
        """One line for each reason, and one for the fields that are not used."""
        lines = [
            f"{count} left out: {reason}{_listed(self.unused_places.get(reason, ()))}"
            for reason, count in self.unused.items()
        ]
        if self.unused_fields:
            counted = [f"{shown(name)} ({count})" for name, count in self.unused_fields.items()]
            more = [f"{len(counted) - MAX_LISTED} more"] if len(counted) > MAX_LISTED else []
            names = ", ".join(counted[:MAX_LISTED] + more)
            rows = max(self.unused_fields.values())
            carry = "row carries" if rows == 1 else "rows carry"
            lines.append(f"{rows} {carry} fields that are not used: {names}")
        return lines

    def refuse_empty(self, path: object, what: str) -> None:
        """Raises DataError with the reasons where nothing is left to use."""
        if not self.items:
            reasons = ", ".join(
                f"{reason} ({count}{_listed(self.unused_places.get(reason, ()), '; ')})"
                for reason, count in self.unused.items()
            )
            raise DataError(f"{path}: no {what} can be used: {reasons or 'it holds none'}")


def collect_results(found: Iterable[tuple[str, T | str]]) -> ReadResult[T]:
    """(place, item or reason) pairs as what can be used and what cannot."""
    items: list[T] = []
    places: list[str] = []
    left_out: dict[str, list[str]] = {}
    for place, item in found:
        if isinstance(item, str):
            left_out.setdefault(item, []).append(place)
        else:
            items.append(item)
            places.append(place)
    return ReadResult(items, {r: len(where) for r, where in left_out.items()}, places, left_out)


def _both(one: ReadResult[Any], other: ReadResult[Any]) -> list[str]:
    return [*dict.fromkeys([*one.unused, *other.unused])]


def _listed(places: Sequence[str], before: str = " (") -> str:
    """The line numbers of places, a few of them."""
    numbers = list(dict.fromkeys(place.rpartition(":")[2] for place in places if place))
    if not numbers:
        return ""
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    end = ")" if before == " (" else ""
    lines = "line" if len(numbers) == 1 else "lines"
    return f"{before}{lines} {', '.join(numbers[:MAX_LISTED])}{more}{end}"
