"""The rows "labelers", "ai_judges" and "position_bias"."""

from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from openpalm.feedback.judgements.categories import category_of
from openpalm.feedback.models import Item, Response, User
from openpalm.feedback.quality.agreement import as_json
from openpalm.feedback.quality.counted import WINNERS, values_of, winners
from openpalm.feedback.quality.response_table import CHUNK, NONE, STATES, Rater, ResponseTable
from openpalm.feedback.statistics.agreement import (
    MatchRates,
    agreement_by_rater,
    match_rates,
)
from openpalm.feedback.statistics.intervals import wilson

SOME = 250
"""judgements that are read at once"""
Sides = dict[Rater, tuple[int, int]]
"""how often the left side was chosen, and how often a side"""
State = Response.State


class Activity:
    """How much each labeler did: numbers of responses by labeler, state and whether in force."""

    def __init__(self, table: ResponseTable):
        rows = table.rows
        cells = (rows["rater"].astype(np.int64) * len(STATES) + rows["state"]) * 2
        numbers = np.bincount(cells + rows["in_force"])
        self.rows: list[tuple[Rater, str, bool, int]] = []
        for cell in np.flatnonzero(numbers).tolist():
            rater, state = divmod(cell // 2, len(STATES))
            in_force, number = bool(cell % 2), int(numbers[cell])
            self.rows.append((table.raters[rater], STATES[state], in_force, number))

    def of_kinds(self) -> dict[str, dict[str, int]]:
        """By author_kind: responses by state; a judgement that was changed is "superseded"."""
        found: dict[str, dict[str, int]] = {}
        for (_, kind), state, in_force, number in self.rows:
            states = found.setdefault(kind, {})
            name = "superseded" if state == State.SUBMITTED and not in_force else state
            states[name] = states.get(name, 0) + number
        return found

    def of_raters(self) -> dict[Rater, dict[str, int]]:
        """Judgements in force, skips and flags; labelers without any of them are left out."""
        found: dict[Rater, dict[str, int]] = {}
        names: dict[str, str] = {State.SKIPPED: "skips", State.FLAGGED: "flags"}
        for rater, state, in_force, number in self.rows:
            name = "judgements" if state == State.SUBMITTED and in_force else names.get(state)
            if name is None:
                continue
            row = found.setdefault(rater, {"judgements": 0, "skips": 0, "flags": 0})
            row[name] += number
        return found


def labelers(
    table: ResponseTable, activity: Activity, medians: dict[Rater, float], sides: Sides
) -> list[dict[str, Any]]:
    """A row for each labeler, the one with most judgements first."""
    work = activity.of_raters()
    names = dict(
        User.objects.filter(pk__in={user for user, _ in work}).values_list("id", "username")
    )
    gold, self_, others = of_gold(table), of_repeats(table), of_others(table)
    rows = []
    for rater, numbers in work.items():
        left, decided = sides.get(rater, (0, 0))
        rows.append(
            {"user": rater[0], "name": names[rater[0]], "author_kind": rater[1], **numbers}
            | {"median_s": medians.get(rater)}
            | _rates(rater, gold, "gold", "gold_items")
            | _rates(rater, self_, "self", "repeats")
            | _rates(rater, others, "others", "shared_items")
            | {"left": as_json(wilson(left, decided)), "decided": decided}
        )
    return sorted(rows, key=lambda row: (-row["judgements"], row["user"], row["author_kind"]))


def _rates(rater: Hashable, rates: MatchRates, name: str, number: str) -> dict[str, Any]:
    estimate = rates.by_rater.get(rater)
    return {name: as_json(estimate), number: rates.comparisons.get(rater, 0)}


def picked_sides(table: ResponseTable) -> Sides:
    """The sides that each labeler chose in comparisons."""
    if table.kind != "compare":
        return {}
    counts, size = table.counted(*User.Kind.values), len(table.raters)
    raters, places = (table.rows[name][counts] for name in ("rater", "place"))
    left = np.bincount(raters[places == 0], minlength=size).tolist()
    decided = np.bincount(raters[places != NONE], minlength=size).tolist()
    judged = set(np.unique(raters).tolist())
    return {rater: (left[n], decided[n]) for n, rater in enumerate(table.raters) if n in judged}


def position_bias(sides: Sides) -> dict[str, dict[str, Any]]:
    """The share of the left side among decided comparisons, by author_kind."""
    sums: dict[str, list[int]] = {}
    for (_, kind), (left, decided) in sides.items():
        one = sums.setdefault(kind, [0, 0])
        one[0] += left
        one[1] += decided
    return {
        kind: {"left": as_json(wilson(left, decided)), "judgements": decided}
        for kind, (left, decided) in sums.items()
    }


def of_gold(table: ResponseTable) -> MatchRates:
    """Agreement with the expected answers of gold items."""
    rows = _judged(table, np.isin(table.rows["item"], table.gold) & (table.rows["repeat"] == 0))
    gold = Item.objects.filter(project=table.project, purpose=Item.Purpose.GOLD)
    expected = {
        pk: (kind, answer)
        for pk, kind, answer in gold.values_list("pk", "gold_kind", "gold").iterator(CHUNK)
    }
    return match_rates(
        _matches((table.raters[rater], pk, expected.get(item)) for pk, item, rater in rows)
    )


def of_repeats(table: ResponseTable) -> MatchRates:
    """Agreement with oneself on items that the queue gave a second time."""
    is_again = table.rows["repeat"] > 0
    again = _judged(table, is_again)
    items = np.unique(table.rows["item"][is_again])
    first = _judged(table, np.isin(table.rows["item"], items) & ~is_again)
    first_of = {(item, rater): pk for pk, item, rater in first}
    return match_rates(
        _matches(
            (table.raters[rater], pk, first_of.get((item, rater))) for pk, item, rater in again
        )
    )


def _judged(table: ResponseTable, chosen: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(id, item, number of the rater) of the judgements in force among the chosen rows."""
    rows = table.rows[table.judged() & chosen]
    return zip(*(rows[name].tolist() for name in ("id", "item", "rater")), strict=True)


Said = tuple[str, dict[str, Any]]
"""kind and payload of a judgement"""


def _matches(
    pairs: Iterable[tuple[Rater, int, int | Said | None]],
) -> Iterator[tuple[Rater, bool]]:
    """Rater, and whether two judgements are alike; those without values are left out.

    `pairs` are rater, a judgement by id, and the other one, by id or as it is.
    """
    waiting = iter(pairs)
    while some := list(islice(waiting, SOME)):
        ids = {pk for _, *both in some for pk in both if isinstance(pk, int)}
        found = Response.objects.filter(pk__in=ids).values_list("pk", "kind", "payload")
        said: dict[int, Said] = {pk: (kind, payload) for pk, kind, payload in found}
        for rater, pk, other in some:
            other = said.get(other) if isinstance(other, int) else other
            if other and pk in said and (same := alike(*said[pk], *other)) is not None:
                yield rater, same


def alike(
    kind: str, payload: dict[str, Any], other_kind: str, other: dict[str, Any]
) -> bool | None:
    """Whether two judgements say the same; None if they have no values.

    Comparisons: the same outcome, of any strength. Rankings: the same best answers. Ratings: each
    axis within one step.
    """
    if kind != other_kind or kind in ("edit", "write"):
        return None
    match kind:
        case "compare":
            one, two = category_of(kind, payload), category_of(kind, other)
            return one is not None and two is not None and WINNERS[one] == WINNERS[two]
        case "rank":
            return set(payload["order"][0]) == set(other["order"][0])
        case "rate":
            one, two = payload["ratings"], other["ratings"]
            return all(abs(one[axis] - two[axis]) <= 1 for axis in one.keys() & two.keys())
        case "thumb":
            return payload["up"] == other["up"]
    return None


def of_others(table: ResponseTable) -> MatchRates:
    """Agreement with the people who judged the same items; simulated labelers with each other."""
    found = MatchRates({}, {})
    if not table.kind:
        return found
    for among, *judges in (
        (User.Kind.PERSON, User.Kind.PERSON, User.Kind.MODEL),
        (User.Kind.SIMULATED, User.Kind.SIMULATED),
    ):
        values = values_of(table, *judges)
        if table.kind == "compare":
            values = winners(values)
        group = table.of_kinds(among)
        rates = agreement_by_rater(values.units, values.raters, values.codes, group)
        raters = table.raters
        found.by_rater.update({raters[n]: rate for n, rate in rates.by_rater.items()})
        found.comparisons.update({raters[n]: number for n, number in rates.comparisons.items()})
    return found


def ai_judges(rows: list[dict[str, Any]], people: dict[str, Any]) -> dict[str, Any]:
    """Models as judges, and how far people agree with each other, to compare with."""
    judges = [row for row in rows if row["author_kind"] == User.Kind.MODEL]
    return {"rows": judges, "people": people.get("raw")}
