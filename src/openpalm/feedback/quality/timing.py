"""The rows "progress" and "time"."""

from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
from django.db.models import Count, F, Sum

from openpalm.feedback.models import Item, Project, User
from openpalm.feedback.quality.labelers import Activity
from openpalm.feedback.quality.response_table import NONE, Rater, ResponseTable

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
    """The time of every judgement in force."""

    def __init__(self, table: ResponseTable):
        chosen = np.flatnonzero(table.judged() & (table.rows["elapsed"] != NONE))
        # By time, so that the middle of each group is its median.
        chosen = chosen[np.argsort(table.rows["elapsed"][chosen], kind="stable")]
        self._elapsed = table.rows["elapsed"][chosen]
        self._raters, self._days = table.rows["rater"][chosen], table.rows["day"][chosen]
        self._table = table

    def of_raters(self) -> dict[Rater, float]:
        """Median seconds of each labeler."""
        found = _medians_s(self._raters, self._elapsed)
        return {self._table.raters[rater]: median for rater, _, median in found}

    def to_json(self) -> dict[str, Any]:
        """By author_kind: the median over all judgements, and of each day."""
        found: dict[str, Any] = {}
        for kind in sorted(User.Kind.values):
            own = self._table.of_kinds(kind)[self._raters]
            elapsed = self._elapsed[own]
            days = [
                {"day": date.fromordinal(day).isoformat(), "judgements": number, "median_s": median}
                for day, number, median in _medians_s(self._days[own], elapsed)
            ]
            for _, number, median in _medians_s(np.zeros(len(elapsed), np.int8), elapsed):
                found[kind] = {"median_s": median, "judgements": number, "days": days[-DAYS:]}
        return found


def _medians_s(groups: np.ndarray, elapsed: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Each group in order, its size, and its median of ascending milliseconds, in seconds."""
    ordered = elapsed[np.argsort(groups, kind="stable")].astype(np.int64)
    names, sizes = np.unique(groups, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    middles = (ordered[starts + (sizes - 1) // 2] + ordered[starts + sizes // 2]) / 2000
    return zip(names.tolist(), sizes.tolist(), middles.tolist(), strict=True)
