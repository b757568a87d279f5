"""Writes the audit log."""

from typing import Any

from openpalm.feedback.accounts.access import ProjectRequest
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


def record_for(request: ProjectRequest, action: str, *, target: object = "", **data: Any) -> Event:
    """Adds an event of the user and the project of a page."""
    return record(action, user=request.user, project=request.project, target=target, **data)
