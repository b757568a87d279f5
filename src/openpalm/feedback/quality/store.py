"""Writes Statistic rows."""

import math
from typing import Any

from openpalm.feedback.models import Project, Statistic


def store(project: Project, name: str, value: Any) -> None:
    """Replaces the figure and sets its time."""
    Statistic.objects.update_or_create(
        project=project, name=name, defaults={"value": finite(value)}
    )


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON and PostgreSQL do not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
