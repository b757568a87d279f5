"""The figures that the worker's job "statistics" has stored, as the pages of the loop read them.

Rows of Statistic by name. E is {"value", "low", "high"}, or null where a figure is undefined; K is
author_kind: people and simulated labelers never share a figure.

    agreement         {K: AgreementFigures.to_json() | {"decided": E}}: `decided` is the raw
                      agreement on pairs without a tie, the ceiling of a reward model
    labelers          {"rows": [{"user", "name", "author_kind", "judgements", "median_s",
                      "gold": E, "gold_items", "self": E, "repeats", "others": E, "shared_items",
                      "left": E}]}; a model's `others` is its agreement with people
    position_bias     {K: {"left": E, "judgements"}}
    board             {K: {"plain": Board.to_json(), "styled": Board.to_json()}}
    reward_agreement  {K: {"models": [{"model": id, "accuracy": E, "judgements"}]}} of each reward
                      model on random-arm judgements that it was not trained on
    calibration       {K: Calibration.to_json() | {"model": id}} of the newest reward model
    disagreements     {"model": id, "rows": [{"item": id, "margin"}]}: the largest first

A project without judgements, or with a worker that has not run, has no row; pages say so.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from openpalm.feedback.models import Project, Statistic, User

NAMES = (
    *("agreement", "labelers", "position_bias", "board"),
    *("reward_agreement", "calibration", "disagreements"),
)


class Figures:
    """The stored figures of a project, in one query."""

    def __init__(self, project: Project, *names: str):
        found = Statistic.objects.filter(project=project, name__in=names or NAMES)
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

    def kinds(self, *names: str) -> list[str]:
        """The kinds of authors that one of the figures exists for, people first."""
        return [k for k in User.Kind.values if any(self.of(name, k) for name in names)]


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def estimate(value: Any) -> Mapping[str, float] | None:
    """E, or None."""
    found = mapping(value)
    return found if isinstance(found.get("value"), (int, float)) else None
