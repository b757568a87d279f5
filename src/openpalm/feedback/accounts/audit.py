"""Writes the audit log."""

from typing import Any

from openpalm.feedback.models import Event, Project, User


def record(
    action: str,
    *,
    user: User | None,
    project: Project | None = None,
    target: object = "",
    **data: Any,
) -> Event:
    """Adds an event such as record("model.promoted", user=..., project=..., target=model)."""
    return Event.objects.create(
        project=project, user=user, action=action, target=str(target)[:200], data=data
    )
