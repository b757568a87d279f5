"""A labeler's own judgements, newest first, and changing one of them."""

from typing import Any

from django.contrib import messages
from django.db.models import Q
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.payloads import payload_of
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.judgements.words import describe_as_shown
from openpalm.feedback.labeling.context import draft_form
from openpalm.feedback.labeling.views import (
    elapsed_ms,
    guideline_version,
    own_assignment,
    show_item,
)
from openpalm.feedback.models import Response, Statistic
from openpalm.feedback.paging import page_of

PAGE = 30
EXCERPT = 160
LABELERS = "labelers"
"""the stored figure of quality/names.py"""
State = Response.State
NOTES = {State.SURPLUS: "not counted: it came after another person's", State.DELETED: "deleted"}


@require_GET
@project_page()
def mine(request: ProjectRequest) -> HttpResponse:
    """The user's judgements that were not replaced or undone."""
    rows = (
        Response.objects.filter(project=request.project, user=request.user)
        .filter(Q(in_force=True) | Q(state__in=[State.SKIPPED, State.SURPLUS, State.DELETED]))
        .select_related("assignment", "item__prompt")
    )
    page = page_of(rows, request, PAGE)
    context = {
        "project": request.project,
        "role": request.role,
        "rows": [_row(request, response) for response in page.rows],
        "page": page,
        "work": None if request.GET.keys() & {"before", "after"} else own_work(request),
    }
    return render(request, "feedback/mine.html", context)


def own_work(request: ProjectRequest) -> dict[str, Any] | None:
    """What the worker has counted of the user: judgements, skips, flags, median time."""
    figure = Statistic.objects.filter(project=request.project, name=LABELERS).first()
    listed = figure.value.get("rows", ()) if figure else ()
    own = next((row for row in listed if row.get("user") == request.user.pk), None)
    return own and {**own, "computed_at": figure.computed_at}  # pyright: ignore


def _row(request: ProjectRequest, response: Response) -> dict[str, Any]:
    response.assignment.project = request.project
    messages_of = response.item.prompt.messages
    asked = messages_of[-1]["content"] if messages_of else ""
    return {
        "response": response,
        "asked": asked if len(asked) <= EXCERPT else asked[:EXCERPT].rstrip() + " …",
        "words": describe_as_shown(response, response.assignment),
        "note": NOTES.get(State(response.state), ""),
        "can_change": response.in_force and response.state == State.SUBMITTED,
        "seconds": None if response.elapsed_ms is None else round(response.elapsed_ms / 1000),
    }


@require_http_methods(["GET", "POST"])
@project_page()
def change(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    """Judges an earlier item again; the new judgement replaces the old one."""
    assignment = own_assignment(request, assignment_id)
    current = assignment.responses.filter(in_force=True, state=State.SUBMITTED).first()
    if current is None:
        messages.warning(request, "This judgement was undone or deleted; it cannot be changed.")
        return redirect("mine", request.project.slug)
    if request.method == "GET":
        assignment.draft = {"kind": current.kind, "payload": current.payload}
        return show_item(request, assignment, draft_form(assignment), changing=True)
    try:
        kind, payload = payload_of(assignment, request.POST)
        judgement = Judgement(kind, payload, elapsed_ms(request), guideline_version(request))
        submission.change(assignment.pk, request.user, judgement)
    except DataError as error:
        return show_item(request, assignment, request.POST, str(error), changing=True)
    messages.success(request, "The judgement is changed.")
    return redirect("mine", request.project.slug)
