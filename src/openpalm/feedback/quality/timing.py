"""The rows "progress" and "time"."""

from array import array
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
from django.db.models import Count, F, Sum

from openpalm.feedback.models import Item, Project, Response
from openpalm.feedback.quality.counted import CHUNK
from openpalm.feedback.quality.labelers import Activity, Rater

DAYS = 366
"""the newest days that are listed"""


def progress(project: Project, activity: Activity) -> dict[str, Any]:
    """Items and responses by state, and the judgements that are still needed."""
    items: dict[str, dict[str, int]] = {}
    found = Item.objects.filter(project=project).order_by().values_list("purpose", "state")
    for purpose, state, number in found.annotate(number=Count("id")):
        items.setdefault(purpose, {})[state] = number
    asked = Item.objects.filter(project=project).exclude(purpose=Item.Purpose.GOLD)
    asked = asked.exclude(state=Item.State.WITHDRAWN)
    sums = asked.aggregate(needed=Sum("needed", default=0), submitted=Sum("submitted", default=0))
    left = asked.filter(state=Item.State.OPEN, submitted__lt=F("needed"))
    missing = left.aggregate(left=Sum(F("needed") - F("submitted"), default=0))
    return {"items": items, "responses": activity.of_kinds(), **sums, **missing}


class Times:
    """Milliseconds of every judgement in force: eight bytes each, the only lists of that length."""

    def __init__(self, project: Project):
        self._of_raters: dict[Rater, array[int]] = {}
        self._of_days: dict[tuple[str, date], array[int]] = {}
        for rater, day, elapsed in _times(project):
            self._of_raters.setdefault(rater, array("I")).append(elapsed)
            self._of_days.setdefault((rater[1], day), array("I")).append(elapsed)

    def of_raters(self) -> dict[Rater, float]:
        """Median seconds of each labeler."""
        return {rater: median_s(times) for rater, times in self._of_raters.items()}

    def to_json(self) -> dict[str, Any]:
        """By author_kind: the median over all judgements, and of each day."""
        found: dict[str, Any] = {}
        for kind in sorted({kind for _, kind in self._of_raters}):
            own = [times for (_, of), times in self._of_raters.items() if of == kind]
            days = sorted(day for of, day in self._of_days if of == kind)
            found[kind] = {
                "median_s": median_s(*own),
                "judgements": sum(map(len, own)),
                "days": [self._day(kind, day) for day in days[-DAYS:]],
            }
        return found

    def _day(self, kind: str, day: date) -> dict[str, Any]:
        times = self._of_days[kind, day]
        return {"day": day.isoformat(), "judgements": len(times), "median_s": median_s(times)}


def _times(project: Project) -> Iterator[tuple[Rater, date, int]]:
    found = Response.objects.filter(
        project=project, in_force=True, state=Response.State.SUBMITTED, elapsed_ms__isnull=False
    )
    columns = ("user_id", "author_kind", "created_at", "elapsed_ms")
    rows = found.order_by().values_list(*columns).iterator(chunk_size=CHUNK)
    return (((user, kind), at.date(), elapsed) for user, kind, at, elapsed in rows)


def median_s(*times: "array[int]") -> float:
    """The median of the milliseconds in all arrays, in seconds."""
    milliseconds = np.concatenate([np.frombuffer(one, dtype=np.uint32) for one in times])
    return float(np.median(milliseconds)) / 1000
