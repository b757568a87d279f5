"""What the pages of managers share: the context of a project, its rows, and its open flags."""

from typing import Any, TypeVar

from django.db.models import Model, QuerySet
from django.http import Http404, HttpResponse
from django.shortcuts import render

from openpalm.feedback.accounts.access import ProjectRequest, has_rank
from openpalm.feedback.models import Project, Response, Role

Row = TypeVar("Row", bound=Model)


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


def find(rows: "QuerySet[Row]", pk: int, request: ProjectRequest) -> Row:
    """The row of this project. Raises Http404, also for a row of another project."""
    found = rows.filter(project=request.project, pk=pk).first()
    if found is None:
        raise Http404(f"there is no such {rows.model._meta.verbose_name} in this project")
    return found


def open_flags(project: Project) -> "QuerySet[Response]":
    """A flag is open until it is resolved or its author judges the item."""
    flagged = Response.objects.filter(project=project, state=Response.State.FLAGGED)
    # Not filter(in_force=True): SQLite would then read all judgements in force by their index.
    return flagged.exclude(in_force=False).order_by("-id")
