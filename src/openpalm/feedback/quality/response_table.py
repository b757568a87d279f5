"""The responses of a project as arrays: what the figures need of them, 34 bytes each.

The worker keeps a table between two jobs; `refresh` then reads only what is new or has changed.
It reads in short queries by id, so that no transaction is open for long: on SQLite a long one
would let the write-ahead log grow.

A response changes in few ways after it was stored: another one supersedes it, it is undone or
deleted, or it is a flag that was resolved. The counts of the database tell whether all such changes
were found; if they were not, the whole table is read again.
"""

from collections.abc import Callable
from datetime import date
from itertools import combinations
from typing import Any

import numpy as np
from django.db.models import CharField, Count, IntegerField
from django.db.models.functions import Cast, Substr

from openpalm.feedback.models import Item, Project, Response, Task

KINDS: dict[str, str] = {
    Task.PAIR: "compare",
    Task.CHAT: "compare",
    Task.RANKING: "rank",
    Task.RATING: "rate",
    Task.THUMBS: "thumb",
}
"""the kind of judgement of each task; texts that people write have no values to agree on"""
Rater = tuple[int, str]
"""user and author_kind"""
State = Response.State
STATES: list[str] = list(State.values)
NONE = -99
CHUNK = 10_000
READ_AGAIN = 200
"""newest rows that each refresh reads again: a transaction may end after one that began later"""
TRIES = 3
ROW = np.dtype(
    [
        ("id", np.int64),
        ("item", np.int64),
        ("rater", np.int32),  # index in `raters`
        ("elapsed", np.int32),  # milliseconds, or NONE
        ("day", np.int32),  # proleptic ordinal of the date
        ("state", np.int8),  # index in STATES
        ("in_force", np.bool_),
        ("is_of_task", np.bool_),  # whether its kind is the one of the project's task
        ("category", np.int8),  # Response.category, or NONE
        ("place", np.int8),  # Response.picked_place, or NONE
        ("repeat", np.int8),
    ]
)
PART = np.dtype([("row", np.int64), ("part", np.int16), ("value", np.int8)])
"""One value of a ranking or a rating: id of the response, index in `parts`, value."""
COLUMNS = (
    *("id", "item_id", "user_id", "author_kind", "elapsed_ms", "day", "state", "force", "kind"),
    *("category", "picked_place", "assignment__repeat", "supersedes_id"),
)
PLACES = {"a": 0, "tie": 1, "b": 2}
"""the values of a pair of answers in a ranking"""
Report = Callable[[int], None]
"""called with the number of rows that were read; may raise to stop"""


class ResponseTable:
    """All responses of a project, by id."""

    def __init__(self, project: Project):
        self.project = project
        self.kind = KINDS.get(project.task, "")
        self._has_parts = self.kind in ("rank", "rate")
        self._days: dict[str, int] = {}
        self._kept: dict[Any, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self.rows = np.empty(0, ROW)
        self.values = np.empty(0, PART)
        self.raters: list[Rater] = []
        self.parts: list[Any] = []
        """pairs of candidates of rankings, or axes of ratings"""
        self._rater_of: dict[Rater, int] = {}
        self._part_of: dict[Any, int] = {}
        self.gold = np.empty(0, np.int64)
        """ids of the gold items"""

    def __len__(self) -> int:
        return len(self.rows)

    def refresh(self, report: Report = lambda count: None) -> None:
        """Brings the table up to date."""
        self.forget()
        if len(self) and not self._is_of_this_database():
            self._clear()
        self._read_new(report)
        if not self._find_changes():
            self._clear()
            self._read_new(report)
        gold = Item.objects.filter(project=self.project, purpose=Item.Purpose.GOLD)
        self.gold = np.array(gold.order_by("id").values_list("id", flat=True), np.int64)

    def _is_of_this_database(self) -> bool:
        """False if rows are gone, as after the restoration of a backup."""
        last = Response.objects.filter(pk=int(self.rows["id"][-1]), project=self.project)
        return last.filter(item=int(self.rows["item"][-1])).exists()

    def _read_new(self, report: Report) -> None:
        kept = self.rows[: max(0, len(self) - READ_AGAIN)]
        last = int(kept["id"][-1]) if len(kept) else 0
        chunks, parts = [kept], [self.values[self.values["row"] <= last]]
        superseded: list[int] = []
        columns = [*COLUMNS, "payload"] if self._has_parts else COLUMNS
        found = (
            Response.objects.filter(project=self.project)
            .order_by("pk")
            .annotate(
                day=Substr(Cast("created_at", CharField()), 1, 10),
                force=Cast("in_force", IntegerField()),
            )
        )
        while rows := list(found.filter(pk__gt=last).values_list(*columns)[:CHUNK]):
            columns_of = list(zip(*rows, strict=True))
            chunks.append(self._encoded(columns_of))
            superseded += [pk for pk in columns_of[12] if pk is not None]
            if self._has_parts:
                parts.append(self._encoded_parts(rows))
            last = rows[-1][0]
            report(len(rows))
        self.rows, self.values = np.concatenate(chunks), np.concatenate(parts)
        self._take_out_of_force(superseded)

    def _encoded(self, columns: list[tuple[Any, ...]]) -> np.ndarray:
        ids, items, users, kinds, elapsed, days, states, force, kind, category, place, repeat, _ = (
            columns[:13]
        )
        rows = np.empty(len(ids), ROW)
        rows["id"], rows["item"], rows["repeat"] = ids, items, repeat
        rows["in_force"] = force
        raters = zip(users, kinds, strict=True)
        rows["rater"] = [number_of(one, self._rater_of, self.raters) for one in raters]
        rows["day"] = [self._day(day) for day in days]
        known = {state: n for n, state in enumerate(STATES)}
        rows["state"] = [known[state] for state in states]
        rows["is_of_task"] = [one == self.kind for one in kind]
        for name, values in (("elapsed", elapsed), ("category", category), ("place", place)):
            rows[name] = [NONE if value is None else value for value in values]
        return rows

    def _day(self, text: str) -> int:
        if text not in self._days:
            self._days[text] = date.fromisoformat(text).toordinal()
        return self._days[text]

    def _encoded_parts(self, rows: list[tuple[Any, ...]]) -> np.ndarray:
        found = [
            (row[0], number_of(part, self._part_of, self.parts), value)
            for row in rows
            if row[8] == self.kind and row[6] == State.SUBMITTED
            for part, value in parts_of(self.kind, row[-1])
        ]
        return np.array(found, PART)

    def _find_changes(self) -> bool:
        """Applies changes of known rows; False if the counts still differ."""
        for _ in range(TRIES):
            if self._counts() == self._counts_of_database():
                return True
            for state in (State.UNDONE, State.DELETED):
                found = self._of_database().filter(state=state)
                ids = np.array(found.values_list("pk", flat=True), np.int64)
                self._set_state(ids, state)
            flags = self._of_database().filter(state=State.FLAGGED).exclude(in_force=True)
            self._take_out_of_force(list(flags.values_list("pk", flat=True)))
        return False

    def _set_state(self, ids: np.ndarray, state: str) -> None:
        at = self.places(ids)
        self.rows["state"][at] = STATES.index(state)
        self.rows["in_force"][at] = False
        self.values = self.values[~np.isin(self.values["row"], ids)]
        if state == State.DELETED:
            self.rows["category"][at] = self.rows["place"][at] = NONE

    def _counts(self) -> tuple[dict[str, int], int]:
        numbers = np.bincount(self.rows["state"], minlength=len(STATES)).tolist()
        states = {name: number for name, number in zip(STATES, numbers, strict=True) if number}
        return states, int(self.rows["in_force"].sum())

    def _counts_of_database(self) -> tuple[dict[str, int], int]:
        """Two counts that indexes answer."""
        found = self._of_database().order_by()
        states = dict(found.values_list("state").annotate(number=Count("pk")))
        return states, found.filter(in_force=True).count()

    def _of_database(self) -> Any:
        last = int(self.rows["id"][-1]) if len(self) else 0
        return Response.objects.filter(project=self.project, pk__lte=last)

    def _take_out_of_force(self, ids: list[int]) -> None:
        self.rows["in_force"][self.places(np.array(ids, np.int64))] = False

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Indices of the rows with these ids; ids without a row are left out."""
        at = np.searchsorted(self.rows["id"], ids)
        at, ids = at[at < len(self)], ids[at < len(self)]
        return at[self.rows["id"][at] == ids]

    # What the figures count.

    def kept(self, name: Any, make: Callable[[], Any]) -> Any:
        """A value that several figures need, made once after each refresh."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def forget(self) -> None:
        """Frees what `kept` holds."""
        self._kept.clear()

    def of_kinds(self, *author_kinds: str) -> np.ndarray:
        """Which raters are of these kinds, (raters,)."""
        return np.array([kind in author_kinds for _, kind in self.raters], dtype=bool)

    def counted(self, *author_kinds: str) -> np.ndarray:
        """Which rows the figures count, of the project's task, (n,).

        A judgement counts once: in force, not a repetition, not of a gold item. What a labeler
        undid, changed or deleted, what came too late (surplus), skips and flags do not count.
        """
        rows = self.rows
        counts = self.judged() & rows["is_of_task"] & (rows["repeat"] == 0)
        counts &= self.of_kinds(*author_kinds)[rows["rater"]]
        if len(self.gold):
            counts[counts] = ~np.isin(rows["item"][counts], self.gold)
        return counts

    def judged(self) -> np.ndarray:
        """Which rows are judgements in force, (n,)."""
        return self.rows["in_force"] & (self.rows["state"] == STATES.index(State.SUBMITTED))


def number_of(value: Any, numbers: dict[Any, int], values: list[Any]) -> int:
    """The number of a value in the order of first appearance."""
    if (number := numbers.get(value)) is None:
        number = numbers[value] = len(values)
        values.append(value)
    return number


def parts_of(kind: str, payload: dict[str, Any]) -> list[tuple[Any, int]]:
    """The values of a ranking, by pair of candidates, or of a rating, by axis."""
    if kind == "rate":
        return list(payload["ratings"].items())
    place = {i: rank for rank, group in enumerate(payload["order"]) for i in group}
    return [
        ((i, j), PLACES["a" if place[i] < place[j] else "b" if place[i] > place[j] else "tie"])
        for i, j in combinations(sorted(place), 2)
    ]
