"""The rows "labelers", "ai_judges" and "position_bias"."""

from collections.abc import Hashable, Iterator
from typing import Any

from django.db.models import Count, OuterRef, Q, Subquery

from openpalm.feedback.judgements.categories import category_of
from openpalm.feedback.models import Item, Project, Response, User
from openpalm.feedback.quality.agreement import as_json
from openpalm.feedback.quality.counted import CHUNK, KINDS, WINNERS, counted, values_by_item
from openpalm.feedback.statistics.agreement import (
    MatchRates,
    agreement_by_rater,
    match_rates,
)
from openpalm.feedback.statistics.intervals import wilson

Rater = tuple[int, str]
"""user and author_kind"""
Sides = dict[Rater, tuple[int, int]]
"""how often the left side was chosen, and how often a side"""
State = Response.State


class Activity:
    """How much each labeler did, from one sum over all responses of the project."""

    def __init__(self, project: Project):
        found = Response.objects.filter(project=project).order_by()
        sums = found.values_list("user_id", "author_kind", "state", "in_force")
        self.rows = list(sums.annotate(number=Count("id")))

    def of_kinds(self) -> dict[str, dict[str, int]]:
        """By author_kind: responses by state; a judgement that was changed is "superseded"."""
        found: dict[str, dict[str, int]] = {}
        for _, kind, state, in_force, number in self.rows:
            states = found.setdefault(kind, {})
            name = "superseded" if state == State.SUBMITTED and not in_force else state
            states[name] = states.get(name, 0) + number
        return found

    def of_raters(self) -> dict[Rater, dict[str, int]]:
        """Judgements in force, skips and flags; labelers without any of them are left out."""
        found: dict[Rater, dict[str, int]] = {}
        names = {State.SKIPPED: "skips", State.FLAGGED: "flags"}
        for user, kind, state, in_force, number in self.rows:
            name = "judgements" if state == State.SUBMITTED and in_force else names.get(state)
            if name is None:
                continue
            row = found.setdefault((user, kind), {"judgements": 0, "skips": 0, "flags": 0})
            row[name] += number
        return found


def labelers(
    project: Project, activity: Activity, medians: dict[Rater, float], sides: Sides
) -> list[dict[str, Any]]:
    """A row for each labeler, the one with most judgements first."""
    work = activity.of_raters()
    names = dict(
        User.objects.filter(pk__in={user for user, _ in work}).values_list("id", "username")
    )
    gold, self_, others = of_gold(project), of_repeats(project), of_others(project, set(work))
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


def picked_sides(project: Project) -> Sides:
    """The sides that each labeler chose in comparisons."""
    if KINDS.get(project.task) != "compare":
        return {}
    found = counted(project, *User.Kind.values).order_by().values_list("user_id", "author_kind")
    sums = found.annotate(left=Count("id", filter=Q(picked_place=0)), decided=Count("picked_place"))
    return {(user, kind): (left, decided) for user, kind, left, decided in sums}


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


def _in_force(project: Project) -> Any:
    return Response.objects.filter(project=project, in_force=True, state=State.SUBMITTED)


def of_gold(project: Project) -> MatchRates:
    """Agreement with the expected answers of gold items."""
    found = _in_force(project).filter(item__purpose=Item.Purpose.GOLD, assignment__repeat=0)
    columns = ("user_id", "author_kind", "kind", "payload", "item__gold_kind", "item__gold")
    return match_rates(_matches(found.values_list(*columns)))


def of_repeats(project: Project) -> MatchRates:
    """Agreement with oneself on items that the queue gave a second time."""
    first = _in_force(project).filter(
        item=OuterRef("item"), user=OuterRef("user"), assignment__repeat=0
    )
    found = _in_force(project).filter(assignment__repeat__gt=0)
    found = found.annotate(
        first_kind=Subquery(first.values("kind")[:1]),
        first_payload=Subquery(first.values("payload")[:1]),
    ).exclude(first_kind=None)
    columns = ("user_id", "author_kind", "first_kind", "first_payload", "kind", "payload")
    return match_rates(_matches(found.values_list(*columns)))


def _matches(rows: Any) -> Iterator[tuple[Rater, bool]]:
    """Rater, and whether the two judgements are alike; those without values are left out."""
    for user, author_kind, kind, payload, other_kind, other in rows.iterator(chunk_size=CHUNK):
        if (same := alike(kind, payload, other_kind, other)) is not None:
            yield (user, author_kind), same


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


def of_others(project: Project, raters: set[Rater]) -> MatchRates:
    """Agreement with the people who judged the same items; simulated labelers with each other."""
    kind = KINDS.get(project.task)
    found = MatchRates({}, {})
    if kind is None:
        return found
    for among, *judges in (
        (User.Kind.PERSON, User.Kind.PERSON, User.Kind.MODEL),
        (User.Kind.SIMULATED, User.Kind.SIMULATED),
    ):
        group = {rater for rater in raters if rater[1] == among}
        if not group:
            continue
        values = values_by_item(counted(project, *judges), kind)
        judgements = (((one.item, one.part), one.rater, one.value) for one in values)
        rates = agreement_by_rater(judgements, among=group)
        found.by_rater.update(rates.by_rater)
        found.comparisons.update(rates.comparisons)
    return found


def ai_judges(rows: list[dict[str, Any]], people: dict[str, Any]) -> dict[str, Any]:
    """Models as judges, and how far people agree with each other, to compare with."""
    judges = [row for row in rows if row["author_kind"] == User.Kind.MODEL]
    return {"rows": judges, "people": people.get("raw")}
