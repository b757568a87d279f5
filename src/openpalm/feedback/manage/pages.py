"""What the pages of managers share: the context of a project, and its open flags."""

from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import render

from openpalm.feedback.accounts.access import ProjectRequest, has_rank
from openpalm.feedback.models import Project, Response, Role


def project_context(request: ProjectRequest) -> dict[str, Any]:
    """The project, the user's role, and which rights it has."""
    return {
        "project": request.project,
        "role": request.role,
        "is_admin": has_rank(request.role, Role.ADMIN),
        "is_owner": has_rank(request.role, Role.OWNER),
    }


def page(
    request: ProjectRequest, template: str, *, status: int = 200, **context: Any
) -> HttpResponse:
    context = project_context(request) | context
    return render(request, f"feedback/manage/{template}.html", context, status=status)


def open_flags(project: Project) -> "QuerySet[Response]":
    """A flag is in force until it is resolved or its author judges the item after all."""
    flagged = Response.objects.filter(project=project, state=Response.State.FLAGGED)
    # Not filter(in_force=True): SQLite would then read all judgements in force by their index.
    return flagged.exclude(in_force=False).order_by("-id")
