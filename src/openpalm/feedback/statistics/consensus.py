"""Several judgements of one item -> one: the majority, or the order by Bradley-Terry.

Comparisons and thumbs keep the outcome of more than half of the labelers; a tie and "both bad" are
outcomes like others. Ratings keep the median of each axis, the lower one of two.

A ranking compares every pair of its answers once, so all pairs of an item are compared equally
often. Then the maximum of Bradley and Terry's likelihood orders the answers by their wins, a tie
being half a win of each (Ford 1957), and no fit is needed. Equal numbers of wins stay a tie.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

Payload = Mapping[str, Any]


def consensus(kind: str, payloads: Sequence[Payload]) -> dict[str, Any] | None:
    """The payload that stands for all of these; None if there is no majority.

    `payloads` are one or more of this kind, of the same candidates. Raises ValueError for a kind
    of which there is no consensus: texts.
    """
    match kind:
        case "compare":
            return _comparison(payloads)
        case "thumb":
            return _majority([dict(payload) for payload in payloads], lambda one: one["up"])
        case "rank":
            return {"order": ranking([payload["order"] for payload in payloads])}
        case "rate":
            return _rating(payloads)
    raise ValueError(f"there is no consensus of {kind}")


def ranking(orders: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The candidates from best to worst, in groups of equal ones."""
    wins: Counter[int] = Counter()
    for order in orders:
        below = sum(map(len, order))
        for group in order:
            below -= len(group)
            for candidate in group:
                wins[candidate] += 2 * below + len(group) - 1  # in halves
    return [
        sorted(candidate for candidate, number in wins.items() if number == level)
        for level in sorted(set(wins.values()), reverse=True)
    ]


def _comparison(payloads: Sequence[Payload]) -> dict[str, Any] | None:
    found = _majority(payloads, outcome)
    if found is None or "better" not in found:
        return found and dict(found)
    agreeing = [payload for payload in payloads if outcome(payload) == outcome(found)]
    strength = median_low(sorted(payload["strength"] for payload in agreeing))
    return {**found, "strength": strength}


def outcome(payload: Payload) -> Any:
    """What a comparison says, whatever its strength."""
    return payload.get("better", "tie" if "tie" in payload else "both_bad")


def _majority(payloads: Sequence[Any], value: Any) -> Any:
    """The first payload with the value that more than half of them have."""
    counts = Counter(map(value, payloads))
    best, number = counts.most_common(1)[0]
    if 2 * number <= len(payloads):
        return None
    return next(payload for payload in payloads if value(payload) == best)


def _rating(payloads: Sequence[Payload]) -> dict[str, Any]:
    axes = sorted({axis for payload in payloads for axis in payload["ratings"]})
    given = {axis: [p["ratings"][axis] for p in payloads if axis in p["ratings"]] for axis in axes}
    ratings = {axis: median_low(values) for axis, values in given.items()}
    return {"ratings": ratings, "candidate": payloads[0]["candidate"]}
