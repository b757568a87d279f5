"""The figures that the worker's job "statistics" has stored, as the pages of the loop read them.

quality/names.py has the rows and their shapes. A project without judgements, or with a worker that
has not run, has none; a figure that is missing is left out of its page.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from openpalm.feedback.models import Project, Statistic, User
from openpalm.feedback.quality import names

LOOP = (
    *(names.AGREEMENT, names.REWARD_AGREEMENT, names.CALIBRATION),
    *(names.DISAGREEMENTS, names.ALARMS),
)
"""the rows of the loop page"""


class Figures:
    """The stored figures of a project, in one query."""

    def __init__(self, project: Project, *wanted: str):
        found = Statistic.objects.filter(project=project, name__in=wanted)
        self._rows = {row.name: row for row in found}

    @property
    def computed_at(self) -> datetime | None:
        """When the oldest of the figures was computed."""
        return min((row.computed_at for row in self._rows.values()), default=None)

    def value(self, name: str) -> Mapping[str, Any]:
        row = self._rows.get(name)
        return mapping(row.value) if row else {}

    def of(self, name: str, kind: str) -> Mapping[str, Any]:
        """The figure of one kind of author."""
        return mapping(self.value(name).get(kind))

    def kinds(self, name: str) -> list[str]:
        """The kinds of authors that the figure exists for, people first."""
        return [kind for kind in User.Kind.values if self.of(name, kind)]


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def estimate(value: Any) -> Mapping[str, float] | None:
    """E, or None."""
    found = mapping(value)
    return found if isinstance(found.get("value"), (int, float)) else None
