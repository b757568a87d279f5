"""Which judgements the figures count, and what each says, as sums over items from the database.

A judgement counts once: in force, not a repetition, not of a gold item. What a labeler undid,
changed or deleted, what came too late (surplus), skips and flags do not count.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, groupby
from typing import Any, NamedTuple

from django.db.models import Count, Q, QuerySet

from openpalm.feedback.judgements.categories import BOTH_BAD
from openpalm.feedback.models import Item, Project, Response, Task
from openpalm.feedback.statistics.agreement import Category, Counts

CHUNK = 5000
KINDS: dict[str, str] = {
    Task.PAIR: "compare",
    Task.CHAT: "compare",
    Task.RANKING: "rank",
    Task.RATING: "rate",
    Task.THUMBS: "thumb",
}
"""the kind of judgement of each task; texts that people write have no values to agree on"""
STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)
CATEGORIES: dict[str, tuple[int, ...]] = {"compare": (*STRENGTHS, BOTH_BAD), "thumb": (0, 1)}
"""the values of Response.category by kind"""
WINNERS: dict[Category, Category] = {
    **dict.fromkeys(STRENGTHS[:3], "a"),
    0: "tie",
    **dict.fromkeys(STRENGTHS[4:], "b"),
    BOTH_BAD: "both_bad",
}
"""category of a comparison -> outcome; a is candidate 0"""
RATINGS = (1, 2, 3, 4, 5)


def counted(project: Project, *author_kinds: str) -> "QuerySet[Response]":
    """The judgements of these kinds of authors that figures count, of the project's task."""
    return Response.objects.filter(
        project=project,
        in_force=True,
        state=Response.State.SUBMITTED,
        author_kind__in=author_kinds,
        kind=KINDS.get(project.task, ""),
        assignment__repeat=0,
        item__purpose__in=(Item.Purpose.TRAINING, Item.Purpose.COMPARISON),
    )


def category_counts(responses: "QuerySet[Response]", kind: str) -> Iterator[tuple[int, Counts]]:
    """How many judgements of each item have each of CATEGORIES[kind], by item."""
    sums = {
        f"category_{n}": Count("id", filter=Q(category=category))
        for n, category in enumerate(CATEGORIES[kind])
    }
    found = responses.order_by("item_id").values("item_id").annotate(**sums)
    for item, *counts in found.values_list("item_id", *sums).iterator(chunk_size=CHUNK):
        yield item, tuple(counts)


class Value(NamedTuple):
    """One value of a judgement. A ranking has one for each pair of answers, a rating for each axis.

    `part` names the pair or the axis; values of one item and part can be compared.
    """

    item: int
    part: Any
    rater: tuple[int, str]
    """user and author_kind"""
    value: Category


def values_by_item(responses: "QuerySet[Response]", kind: str) -> Iterator[Value]:
    """The values of all judgements, those of one item and part one after the other.

    Holds one item at a time.
    """
    columns = ("item_id", "user_id", "author_kind", "category", "payload")
    columns = columns[: 4 if kind in CATEGORIES else 5]
    rows: Iterable[Any] = responses.order_by("item_id").values_list(*columns)
    rows = rows.iterator(chunk_size=CHUNK)  # pyright: ignore[reportAttributeAccessIssue]
    if kind in CATEGORIES:
        meaning = WINNERS if kind == "compare" else {0: 0, 1: 1}
        for item, user, author_kind, category in rows:
            yield Value(item, None, (user, author_kind), meaning[category])
        return
    for item, group in groupby(rows, key=lambda row: row[0]):
        given = [
            Value(item, part, (user, author_kind), value)
            for _, user, author_kind, _, payload in group
            for part, value in parts_of(kind, payload)
        ]
        yield from sorted(given, key=lambda one: one.part)


def parts_of(kind: str, payload: dict[str, Any]) -> Iterator[tuple[Any, Category]]:
    """The values of a ranking, by pair of candidates, or of a rating, by axis."""
    if kind == "rate":
        yield from payload["ratings"].items()
        return
    place = {i: rank for rank, group in enumerate(payload["order"]) for i in group}
    for i, j in combinations(sorted(place), 2):
        yield (i, j), "a" if place[i] < place[j] else "b" if place[i] > place[j] else "tie"


Outcomes = Counter[str]
"""how many judgements say a, b, tie, both_bad"""


def pair_outcomes(
    responses: "QuerySet[Response]", kind: str
) -> Iterator[tuple[int, dict[tuple[int, int], Outcomes]]]:
    """Of each item in order of id: the outcomes of each pair of its candidates."""
    if kind == "compare":
        for item, counts in category_counts(responses, kind):
            outcomes: Outcomes = Counter()
            for category, number in zip(CATEGORIES[kind], counts, strict=True):
                outcomes[str(WINNERS[category])] += number
            yield item, {(0, 1): +outcomes}
    elif kind == "rank":
        for item, values in groupby(values_by_item(responses, kind), key=lambda one: one.item):
            pairs: dict[tuple[int, int], Outcomes] = {}
            for value in values:
                pairs.setdefault(value.part, Counter())[str(value.value)] += 1
            yield item, pairs
