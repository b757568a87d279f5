"""What the pages of the loop share: their context, and finding what a URL names."""

from typing import Any, TypeVar

from django.contrib import messages
from django.db.models import Model, QuerySet
from django.http import Http404, HttpResponse
from django.shortcuts import redirect, render
from django_htmx.http import HttpResponseClientRefresh

from openpalm.feedback.accounts.access import ProjectRequest
from openpalm.feedback.manage.pages import project_context

Row = TypeVar("Row", bound=Model)


def page(
    request: ProjectRequest, template: str, *, status: int = 200, **context: Any
) -> HttpResponse:
    context = project_context(request) | {"in_loop": True} | context
    return render(request, f"feedback/loop/{template}.html", context, status=status)


def live_page(
    request: ProjectRequest, template: str, *, state: str, **context: Any
) -> HttpResponse:
    """The page, or for htmx the part of it that moves, which comes again until the work has ended.

    When the state has changed, htmx loads the whole page again: its buttons follow from the state.
    """
    if not request.htmx:  # pyright: ignore
        return page(request, template, **context)
    if request.GET.get("state", state) != state:
        return HttpResponseClientRefresh()
    return page(request, f"{template}_live", **context)


def find(rows: "QuerySet[Row]", pk: int, request: ProjectRequest) -> Row:
    """The row of this project. Raises Http404, also for a row of another project."""
    found = rows.filter(project=request.project, pk=pk).first()
    if found is None:
        raise Http404(f"there is no such {rows.model._meta.verbose_name} in this project")
    return found


def refused(request: ProjectRequest, reason: object, *to: Any) -> HttpResponse:
    """Back to a page, which says why nothing was done."""
    messages.error(request, f"{reason}")
    return redirect(*to)
