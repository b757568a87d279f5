"""What the pages of the loop share: their context, and the way back from a refusal."""

from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django_htmx.http import HttpResponseClientRefresh

from openpalm.feedback.accounts.access import ProjectRequest
from openpalm.feedback.manage.pages import project_context


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


def refused(request: ProjectRequest, reason: object, *to: Any) -> HttpResponse:
    """Back to a page, which says why nothing was done."""
    messages.error(request, f"{reason}")
    return redirect(*to)
