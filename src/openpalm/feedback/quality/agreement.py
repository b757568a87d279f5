"""The rows "agreement" and "consensus": how far labelers agree about the same items."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from openpalm.feedback.judgements.categories import BOTH_BAD
from openpalm.feedback.models import Project
from openpalm.feedback.quality.counted import CATEGORIES, WINNERS, Values, values_of
from openpalm.feedback.quality.response_table import ResponseTable
from openpalm.feedback.statistics.agreement import AgreementCounts, Category
from openpalm.feedback.statistics.alpha import Scale
from openpalm.feedback.statistics.intervals import Estimate

LISTED = 100
"""items without a majority that are named"""
DECIDED: dict[Category, Category] = {"a": "a", "b": "b"}


def agreement(
    table: ResponseTable, author_kind: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Agreement and consensus of these labelers; None without a judgement that has values."""
    if table.kind not in CATEGORIES:
        return None
    values = values_of(table, author_kind)
    if not len(values.codes):
        return None
    if table.kind == "rank":
        return _of_ranking(values), consensus_of_rankings(values, table.parts)
    if table.kind == "rate":
        return _of_rating(values, table.parts), {}
    return _of_categories(table.project, values, table.kind)


def _of_categories(
    project: Project, values: Values, kind: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Comparisons and thumbs."""
    table = _table(values, values.counts)
    shared = consensus(values, kind)
    if kind == "thumb":
        return _whole(table, unit="item"), shared
    winners, _ = table.regrouped(WINNERS)
    steps = _steps(project, table)
    ordinal, left_out = table.regrouped({step: step for step in range(-steps, steps + 1)})
    parts = [_part("strength", ordinal, left_out)]
    return _whole(winners, unit="item", parts=parts) | {
        "decided": as_json(decided(winners))
    }, shared


def _table(values: Values, counts: np.ndarray) -> AgreementCounts:
    patterns, numbers = np.unique(counts, axis=0, return_counts=True)
    return AgreementCounts.of_patterns(values.categories, patterns, numbers)


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


def _of_ranking(values: Values) -> dict[str, Any]:
    pairs = _table(values, values.counts)
    return _whole(pairs, unit="pair of answers") | {"decided": as_json(decided(pairs))}


def _of_rating(values: Values, axes: list[str]) -> dict[str, Any]:
    """All axes together, and each one."""
    whole = _table(values, values.counts)
    tables = {
        axes[part]: _table(values, values.counts[values.unit_parts == part])
        for part in np.unique(values.unit_parts).tolist()
    }
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


CONSENSUS = ("single", "unanimous", "majority", "without")


def consensus(values: Values, kind: str) -> dict[str, Any]:
    """The items with and without a majority."""
    patterns, of_items = np.unique(values.counts, axis=0, return_inverse=True)
    found = [CONSENSUS.index(_majority(kind, counts)) for counts in patterns.tolist()]
    return _consensus(values.unit_items, np.array(found)[of_items])


def _consensus(items: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """From items, ascending, and what was found of each, as an index in CONSENSUS."""
    single, *numbers = np.bincount(found, minlength=len(CONSENSUS)).tolist()
    without = items[found == CONSENSUS.index("without")]
    return {
        "judged": single + sum(numbers),
        "shared": sum(numbers),
        **dict(zip(CONSENSUS[1:], numbers, strict=True)),
        "items": without[::-1][:LISTED].tolist(),
    }


def consensus_of_rankings(values: Values, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """As of comparisons; an item has a majority if the consensus has one best answer.

    By wins, which order the answers as Bradley and Terry do: see statistics/consensus.py.
    """
    items, first, of_units = np.unique(values.unit_items, return_index=True, return_inverse=True)
    a, tie, b = values.counts.T
    i, j = np.array(pairs)[values.unit_parts].T
    wins = np.full((len(items), int(max(map(max, pairs))) + 1), -1)
    wins[of_units, i] = wins[of_units, j] = 0
    np.add.at(wins, (of_units, i), 2 * a + tie)
    np.add.at(wins, (of_units, j), 2 * b + tie)
    is_split = np.bincount(of_units, (values.counts > 0).sum(axis=1) > 1) > 0
    has_one_best = (wins == wins.max(axis=1, keepdims=True)).sum(axis=1) == 1
    is_single = values.counts.sum(axis=1)[first] < 2
    names = np.select([is_single, ~is_split, has_one_best], [0, 1, 2], 3)
    return _consensus(items, names)


def _majority(kind: str, counts: Sequence[int]) -> str:
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


def people_on_items(pairs: np.ndarray) -> Estimate | None:
    """Raw agreement from the judgements for a and for b of each pair, (n, 2)."""
    patterns, numbers = np.unique(pairs, axis=0, return_counts=True)
    return AgreementCounts.of_patterns(("a", "b"), patterns, numbers).raw()
