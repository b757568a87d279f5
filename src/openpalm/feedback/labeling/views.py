"""The pages of labelers: the next item, submit, draft, skip, flag, undo, the guidelines."""

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.labeling import queue, submission
from openpalm.feedback.labeling.payloads import payload_of
from openpalm.feedback.labeling.submission import Judgement
from openpalm.feedback.models import Assignment, Response

MAX_ELAPSED_MS = 24 * 3600 * 1000


@require_GET
@project_page()
def label(request: ProjectRequest) -> HttpResponse:
    """The user's next item."""
    return show_next(request)


def show_next(request: ProjectRequest, error: str = "") -> HttpResponse:
    assignment = queue.next_assignment(request.project, request.user)
    context: dict[str, Any] = {"project": request.project, "role": request.role, "error": error}
    if assignment:
        context |= _item_context(assignment)
    context["mine"] = Response.objects.filter(
        project=request.project, user=request.user, in_force=True
    ).count()
    template = "item.html" if request.htmx else "label.html"  # pyright: ignore
    return render(request, f"feedback/{template}", context, status=422 if error else 200)


def _item_context(assignment: Assignment) -> dict[str, Any]:
    places = list(assignment.item.places.select_related("candidate"))
    shown = [places[position].candidate for position in assignment.order]
    project = assignment.project
    return {
        "assignment": assignment,
        "item": assignment.item,
        "prompt": assignment.item.prompt.messages,
        "candidates": list(zip("ABCDEFGHIJ", shown, assignment.order, strict=False)),
        "steps": range(1, project.scale + 1),
        "middle": (project.scale + 1) // 2,
        "draft": assignment.draft or {},
        "guideline": project.guideline,
    }


def _elapsed_ms(request: HttpRequest) -> int | None:
    try:
        elapsed = int(request.POST.get("elapsed_ms", ""))
    except ValueError:
        return None
    return elapsed if 0 <= elapsed <= MAX_ELAPSED_MS else None


def _mine(request: ProjectRequest, assignment_id: int) -> Assignment:
    found = Assignment.objects.filter(
        pk=assignment_id, user=request.user, project=request.project
    ).select_related("project", "item")
    if not (assignment := found.first()):
        raise Http404("this item is not yours")
    return assignment


def _after(request: ProjectRequest) -> HttpResponse:
    if request.htmx:  # pyright: ignore[reportAttributeAccessIssue]
        return show_next(request)
    return redirect("label", request.project.slug)


@require_POST
@project_page()
def submit(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    assignment = _mine(request, assignment_id)
    guideline = request.project.guideline
    try:
        kind, payload = payload_of(assignment, request.POST)
    except DataError as error:
        return show_next(request, str(error))
    judgement = Judgement(
        kind, payload, _elapsed_ms(request), guideline.version if guideline else None
    )
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
    form = {k: v for k, v in request.POST.items() if k not in ("csrfmiddlewaretoken",)}
    submission.save_draft(_mine(request, assignment_id).pk, request.user, form)
    return HttpResponse(status=204)


@require_POST
@project_page()
def skip(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    assignment = _mine(request, assignment_id)
    reason = request.POST.get("reason", "")[:2000]
    submission.skip(assignment.pk, request.user, reason, _elapsed_ms(request))
    return _after(request)


@require_POST
@project_page()
def flag(request: ProjectRequest, assignment_id: int) -> HttpResponse:
    assignment = _mine(request, assignment_id)
    try:
        reason = request.POST.get("reason", "")[:2000]
        submission.flag(assignment.pk, request.user, reason, elapsed_ms=_elapsed_ms(request))
    except DataError as error:
        return show_next(request, str(error))
    return _after(request)


@require_POST
@project_page()
def undo(request: ProjectRequest) -> HttpResponse:
    try:
        if submission.undo(request.project, request.user) is None:
            messages.info(request, "There is nothing to undo.")
    except DataError as error:
        messages.warning(request, str(error))
    return _after(request)


@require_GET
@project_page()
def guidelines(request: ProjectRequest) -> HttpResponse:
    context = {"project": request.project, "role": request.role}
    return render(request, "feedback/guidelines.html", context)
