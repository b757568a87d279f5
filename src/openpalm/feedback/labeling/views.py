"""The pages of labelers: the next item, submit, draft, skip, flag, undo, the guidelines."""

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django_htmx.http import HttpResponseClientRedirect

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.errors import sentence
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.payloads import payload_of
from openpalm.feedback.judgements.submission import MAX_ELAPSED_MS, MAX_REASON, Judgement
from openpalm.feedback.labeling.context import (
    guideline_in,
    item_context,
    left_to_judge,
    page_context,
)
from openpalm.feedback.labeling.markdown import to_html
from openpalm.feedback.models import Assignment, Response, Task

# A reload after an error, or a return from the sign-in, requests these URLs with GET.
posted = require_http_methods(["GET", "POST"])
FORMATTED = "formatted"
"""whether the user reads Markdown as HTML, in the session"""


@require_GET
@project_page()
def label(request: ProjectRequest) -> HttpResponse:
    """The user's next item, or the conversation of a chat project."""
    return show_next(request)


def show_next(request: ProjectRequest) -> HttpResponse:
    assignment = queue.next_assignment(request.project, request.user)
    if assignment is None and request.project.task == Task.CHAT:
        address = reverse("chat", args=[request.project.slug])
        return HttpResponseClientRedirect(address) if request.htmx else redirect(address)  # pyright: ignore
    return show_item(request, assignment)


def show_item(
    request: ProjectRequest,
    assignment: Assignment | None,
    form: Mapping[str, Any] | None = None,
    error: str = "",
    **more: Any,
) -> HttpResponse:
    """The item's page; for htmx the item alone. An error keeps what was typed."""
    context = page_context(request, error) | more
    if assignment:
        assignment.project = request.project
        formatted = request.session.get(FORMATTED, False)
        context |= item_context(assignment, form, formatted=formatted)
        context["left"] = left_to_judge(request)
    template = "item.html" if request.htmx else "label.html"  # pyright: ignore
    return render(request, f"feedback/{template}", context, status=422 if error else 200)


def elapsed_ms(request: HttpRequest) -> int | None:
    """The time that the page measured; None without JavaScript."""
    try:
        elapsed = int(request.POST.get("elapsed_ms", ""))
    except ValueError:
        return None
    return elapsed if 0 <= elapsed <= MAX_ELAPSED_MS else None


def guideline_version(request: ProjectRequest) -> int | None:
    guideline = request.project.guideline
    return guideline.version if guideline else None


def own_assignment(request: ProjectRequest, assignment_id: int) -> Assignment:
    found = Assignment.objects.filter(
        pk=assignment_id, user=request.user, project=request.project
    ).select_related("project", "item__prompt")
    if not (assignment := found.first()):
        raise Http404("this item is not yours")
    return assignment


def _after(request: ProjectRequest) -> HttpResponse:
    if request.htmx:  # pyright: ignore[reportAttributeAccessIssue]
        return show_next(request)
    return redirect("label", request.project.slug)


@posted
@project_page()
def submit(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    if request.method == "GET":
        return redirect("label", request.project.slug)
    assignment = own_assignment(request, assignment_id)
    try:
        kind, payload = payload_of(assignment, request.POST)
    except DataError as error:
        return show_item(request, assignment, request.POST, str(error))
    judgement = Judgement(kind, payload, elapsed_ms(request), guideline_version(request))
    response = submission.submit(assignment.pk, request.user, judgement)
    if response.state == Response.State.SURPLUS:
        messages.warning(
            request,
            "This item had gone to another person while it was open here for too long. Your "
            "judgement is kept but not counted.",
        )
    return _after(request)


@require_POST
@project_page()
def draft(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    _save_draft(request, own_assignment(request, assignment_id))
    return HttpResponse(status=204)


def _save_draft(request: ProjectRequest, assignment: Assignment) -> None:
    kept = request.POST.keys() - {"csrfmiddlewaretoken", FORMATTED}
    submission.save_draft(assignment.pk, request.user, {name: request.POST[name] for name in kept})


@posted
@project_page()
def view(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    """Shows texts formatted, or as they were written; what was typed stays."""
    if request.method == "POST":
        _save_draft(request, own_assignment(request, assignment_id))
        request.session[FORMATTED] = request.POST.get(FORMATTED) == "1"
    return _after(request)


@posted
@project_page()
def skip(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    if request.method == "GET":
        return redirect("label", request.project.slug)
    assignment = own_assignment(request, assignment_id)
    reason = request.POST.get("reason", "")[:MAX_REASON]
    about = elapsed_ms(request), guideline_version(request)
    submission.skip(assignment.pk, request.user, reason, *about)
    return _after(request)


@posted
@project_page()
def flag(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    if request.method == "GET":
        return redirect("label", request.project.slug)
    assignment = own_assignment(request, assignment_id)
    reason = request.POST.get("reason", "")[:MAX_REASON]
    about = elapsed_ms(request), guideline_version(request)
    try:
        submission.flag(assignment.pk, request.user, reason, None, *about)
    except DataError as error:
        return show_item(request, assignment, request.POST, str(error), flagging=True)
    return _after(request)


@require_POST
@project_page()
def undo(request: ProjectRequest) -> HttpResponse:
    try:
        if submission.undo(request.project, request.user) is None:
            messages.info(request, "There is nothing to undo.")
    except DataError as error:
        messages.warning(request, sentence(error))
    return _after(request)


@require_GET
@project_page()
def guidelines(request: ProjectRequest) -> HttpResponse:
    """The versions of the guidelines; the newest, or `?version=`."""
    versions = request.project.guidelines.order_by("-version")
    guideline = guideline_in(request)
    context = {
        "project": request.project,
        "role": request.role,
        "guideline": guideline,
        "guideline_html": to_html(guideline.text) if guideline else "",
        "versions": list(versions.values_list("version", flat=True)[:20]),
    }
    return render(request, "feedback/guidelines.html", context)
