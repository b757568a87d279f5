"""The rows "agreement" and "consensus": how far labelers agree about the same items."""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from openpalm.feedback.judgements.categories import BOTH_BAD
from openpalm.feedback.models import Project
from openpalm.feedback.quality.counted import (
    CATEGORIES,
    KINDS,
    RATINGS,
    WINNERS,
    category_counts,
    counted,
    pair_outcomes,
    values_by_item,
)
from openpalm.feedback.statistics.agreement import AgreementCounts, Category, Counts
from openpalm.feedback.statistics.alpha import Scale
from openpalm.feedback.statistics.intervals import Estimate

LISTED = 100
"""items without a majority that are named"""
DECIDED: dict[Category, Category] = {"a": "a", "b": "b"}


def agreement(project: Project, author_kind: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Agreement and consensus of these labelers; None without a judgement that has values."""
    kind = KINDS.get(project.task)
    if kind in CATEGORIES:
        return _of_categories(project, author_kind, kind)
    if kind in ("rank", "rate"):
        tables = tables_of_parts(project, author_kind, kind)
        if kind == "rate":
            figures, consensus = _of_rating(tables), {}
        else:
            figures, consensus = _of_ranking(tables), _consensus_of_rankings(project, author_kind)
        return None if figures is None else (figures, consensus)
    return None


def _of_categories(
    project: Project, author_kind: str, kind: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Comparisons and thumbs: from the database's sums over items."""
    consensus = _Consensus(kind)
    sums = category_counts(counted(project, author_kind), kind)
    table = AgreementCounts.of_items(CATEGORIES[kind], (consensus.seen(*item) for item in sums))
    if not table.arrays()[1].sum():
        return None
    if kind == "thumb":
        return _whole(table, unit="item"), consensus.to_json()
    winners, _ = table.regrouped(WINNERS)
    steps = _steps(project, table)
    ordinal, left_out = table.regrouped({step: step for step in range(-steps, steps + 1)})
    parts = [_part("strength", ordinal, left_out)]
    return _whole(winners, unit="item", parts=parts) | {
        "decided": as_json(decided(winners))
    }, consensus.to_json()


def _steps(project: Project, table: AgreementCounts) -> int:
    """Steps on each side of the tie: those of the scale, more if an earlier scale had more."""
    patterns, _ = table.arrays()
    chosen = [c for c, n in zip(table.categories, patterns.sum(axis=0), strict=True) if n]
    most = max((abs(int(c)) for c in chosen if c != BOTH_BAD), default=0)
    return max(project.scale // 2, most)


def decided(winners: AgreementCounts) -> Estimate | None:
    """Raw agreement on who is better, of judgements that name one."""
    return winners.regrouped(DECIDED)[0].raw()


def as_json(estimate: Estimate | None) -> dict[str, float] | None:
    return estimate and estimate._asdict()


def tables_of_parts(project: Project, author_kind: str, kind: str) -> dict[str, AgreementCounts]:
    """A table for each axis of a rating; for rankings one table of all pairs of answers."""
    categories = ("a", "tie", "b") if kind == "rank" else RATINGS
    found: dict[str, Counter[Counts]] = {}
    values = values_by_item(counted(project, author_kind), kind)
    for (_, part), group in groupby(values, key=lambda one: (one.item, one.part)):
        of = Counter(one.value for one in group)
        name = "" if kind == "rank" else part
        found.setdefault(name, Counter())[tuple(of[c] for c in categories)] += 1
    return {
        name: AgreementCounts.of_items(categories, vectors.elements())
        for name, vectors in found.items()
    }


def _of_ranking(tables: dict[str, AgreementCounts]) -> dict[str, Any] | None:
    if not tables:
        return None
    pairs = tables[""]
    return _whole(pairs, unit="pair of answers") | {"decided": as_json(decided(pairs))}


def _consensus_of_rankings(project: Project, author_kind: str) -> dict[str, Any]:
    """As of comparisons; an item has a majority if the consensus has one best answer."""
    consensus = _Consensus("rank")
    for item, pairs in pair_outcomes(counted(project, author_kind), "rank"):
        consensus.add(item, _agreed_best(pairs))
    return consensus.to_json()


def _agreed_best(pairs: Mapping[tuple[int, int], Mapping[str, int]]) -> str:
    """By wins, which order the answers as Bradley and Terry do: see statistics/consensus.py."""
    wins: Counter[int] = Counter()
    for (i, j), outcomes in pairs.items():
        wins[i] += 2 * outcomes.get("a", 0) + outcomes.get("tie", 0)
        wins[j] += 2 * outcomes.get("b", 0) + outcomes.get("tie", 0)
    if sum(next(iter(pairs.values())).values()) < 2:
        return "single"
    if all(len(outcomes) == 1 for outcomes in pairs.values()):
        return "unanimous"
    best = max(wins.values())
    return "majority" if list(wins.values()).count(best) == 1 else "without"


def _of_rating(tables: dict[str, AgreementCounts]) -> dict[str, Any] | None:
    """All axes together, and each one."""
    if not tables:
        return None
    whole = AgreementCounts(RATINGS)
    for table in tables.values():
        whole.merge(table)
    parts = [_part(name, table, 0) for name, table in sorted(tables.items())]
    return _whole(whole, "ordinal", unit="axis of an item", parts=parts)


def _whole(
    table: AgreementCounts,
    scale: Scale = "nominal",
    *,
    unit: str,
    parts: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    figures = table.figures(scale).to_json()
    return figures | {"scale": scale, "unit": unit, "decided": None, "parts": list(parts)}


def _part(name: str, table: AgreementCounts, left_out: int) -> dict[str, Any]:
    figures = table.figures("ordinal").to_json()
    return figures | {"name": name, "scale": "ordinal", "left_out": left_out}


class _Consensus:
    """Counts the items with and without a majority while their sums pass by."""

    def __init__(self, kind: str):
        self._kind = kind
        self._counts: Counter[str] = Counter()
        self._without: list[int] = []

    def seen(self, item: int, counts: Counts) -> Counts:
        self.add(item, _majority(self._kind, counts))
        return counts

    def add(self, item: int, found: str) -> None:
        self._counts[found] += 1
        if found == "without":
            heapq.heappush(self._without, item)
            if len(self._without) > LISTED:
                heapq.heappop(self._without)

    def to_json(self) -> dict[str, Any]:
        shared = ("unanimous", "majority", "without")
        numbers = {name: self._counts[name] for name in shared}
        return {
            "judged": self._counts.total(),
            "shared": sum(numbers.values()),
            **numbers,
            "items": sorted(self._without, reverse=True),
        }


@cache
def _majority(kind: str, counts: Counts) -> str:
    """single, unanimous, majority (more than half) or without one; by outcome, not strength."""
    votes: Counter[Category] = Counter()
    for category, number in zip(CATEGORIES[kind], counts, strict=True):
        votes[WINNERS[category] if kind == "compare" else category] += number
    total, most = votes.total(), max(votes.values())
    if total < 2:
        return "single"
    if most == total:
        return "unanimous"
    return "majority" if 2 * most > total else "without"


def people_on_items(pairs: Iterator[tuple[int, int]]) -> Estimate | None:
    """Raw agreement from (judgements for a, judgements for b) of each pair."""
    return AgreementCounts.of_items(("a", "b"), pairs).raw()
