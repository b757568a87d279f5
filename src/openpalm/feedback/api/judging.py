"""Judging over the API: the next item, then submit, skip, flag or draft; change and undo.

Candidates are numbered as they are shown, from 0, in the request and in its payload: the item's own
order could tell the model. The client sees no name of a model while the project is blind.
"""

from typing import Any

from django.http import JsonResponse

from openpalm.data.rows.payloads import is_payload
from openpalm.feedback.api.protocol.endpoints import Call, operation
from openpalm.feedback.api.protocol.errors import ApiError, refusals
from openpalm.feedback.items.model_names import is_blind
from openpalm.feedback.items.tasks import KINDS
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.payloads import wrong_payload
from openpalm.feedback.judgements.submission import MAX_ELAPSED_MS, MAX_REASON, Judgement
from openpalm.feedback.models import Assignment, Project, Response, Role

MAX_PAYLOAD = 200_000


@operation("responses:write", Role.ANNOTATOR)
def next_item(call: Call, slug: str) -> JsonResponse:
    """Leases the next item; `assignment` is null if nothing is left for this user."""
    project, _ = call.enter(slug)
    call.finish()
    return _leased(queue.next_assignment(project, call.user), project)


@operation("responses:write", Role.ANNOTATOR)
def undo_last(call: Call, slug: str) -> JsonResponse:
    """Opens the user's last item again; `assignment` is null if there is nothing to undo."""
    project, _ = call.enter(slug)
    call.finish()
    with refusals():
        assignment = submission.undo(project, call.user)
    return _leased(assignment, project)


def _leased(assignment: Assignment | None, project: Project) -> JsonResponse:
    shown = _assignment_json(assignment, project) if assignment else None
    return JsonResponse({"assignment": shown})


def _assignment_json(assignment: Assignment, project: Project) -> dict[str, Any]:
    places = list(assignment.item.places.select_related("candidate__model"))
    guideline = project.guideline
    candidates = []
    for position in assignment.order:
        candidate = places[position].candidate
        shown: dict[str, Any] = {"text": candidate.text}
        if not is_blind(project, assignment.item):
            shown["model"] = candidate.model.name if candidate.model else None
        candidates.append(shown)
    return {
        "id": assignment.pk,
        "item": assignment.item_id,
        "task": project.task,
        "kind": KINDS[project.task],
        "scale": project.scale,
        "axes": project.axes,
        "guideline_version": guideline.version if guideline else None,
        "messages": assignment.item.prompt.messages,
        "candidates": candidates,
        "draft": _shown_draft(assignment),
        "expires": assignment.expires_at.isoformat(),
    }


@operation("responses:write", Role.ANNOTATOR)
def submit(call: Call, assignment_id: int) -> JsonResponse:
    """Stores the judgement. A repeated request returns the response of the first one."""
    assignment = _mine(call, assignment_id)
    judgement = _judgement(call, assignment)
    return _stored(submission.submit(assignment.pk, call.user, judgement))


@operation("responses:write", Role.ANNOTATOR)
def change(call: Call, assignment_id: int) -> JsonResponse:
    """Replaces an earlier judgement by another one, which supersedes it."""
    assignment = _mine(call, assignment_id)
    judgement = _judgement(call, assignment)
    with refusals():
        return _stored(submission.change(assignment.pk, call.user, judgement))


def _judgement(call: Call, assignment: Assignment) -> Judgement:
    kind = KINDS[assignment.project.task]
    shown = call.body.group("payload", MAX_PAYLOAD)
    judgement = Judgement(
        kind,
        _check(call, assignment, kind, shown),
        call.body.whole("elapsed_ms", 0, MAX_ELAPSED_MS, None),
        _guideline_version(call, assignment.project),
    )
    call.finish()
    return judgement


@operation("responses:write", Role.ANNOTATOR)
def skip(call: Call, assignment_id: int) -> JsonResponse:
    assignment = _mine(call, assignment_id)
    reason = call.body.text("reason", most=MAX_REASON, default="")
    elapsed_ms = call.body.whole("elapsed_ms", 0, MAX_ELAPSED_MS, None)
    version = _guideline_version(call, assignment.project)
    call.finish()
    return _stored(submission.skip(assignment.pk, call.user, reason, elapsed_ms, version))


@operation("responses:write", Role.ANNOTATOR)
def flag(call: Call, assignment_id: int) -> JsonResponse:
    """`candidate` is the number, as shown, of the one that is wrong."""
    assignment = _mine(call, assignment_id)
    reason = call.body.text("reason", most=MAX_REASON)
    shown = call.body.whole("candidate", 0, len(assignment.order) - 1, None)
    elapsed_ms = call.body.whole("elapsed_ms", 0, MAX_ELAPSED_MS, None)
    version = _guideline_version(call, assignment.project)
    call.finish()
    place = None if shown is None else assignment.order[shown]
    return _stored(submission.flag(assignment.pk, call.user, reason, place, elapsed_ms, version))


@operation("responses:write", Role.ANNOTATOR)
def draft(call: Call, assignment_id: int) -> JsonResponse:
    """Keeps an unfinished judgement and extends the lease."""
    assignment = _mine(call, assignment_id)
    kind = KINDS[assignment.project.task]
    payload = _check(call, assignment, kind, call.body.group("payload", MAX_PAYLOAD))
    call.finish()
    draft = {"kind": kind, "payload": payload, "reason": ""}
    submission.save_draft(assignment.pk, call.user, draft)
    assignment.refresh_from_db()
    return JsonResponse({"expires": assignment.expires_at.isoformat()})


def _mine(call: Call, assignment_id: int) -> Assignment:
    found = Assignment.objects.filter(pk=assignment_id, user=call.user)
    assignment = found.select_related("project").first()
    if assignment is None:
        raise ApiError(404, "this assignment is not yours, or there is none")
    call.enter(assignment.project.slug)
    return assignment


def _stored(response: Response) -> JsonResponse:
    counted = response.state != Response.State.SURPLUS
    shown = {"id": str(response.uid), "state": response.state, "counted": counted}
    return JsonResponse({"response": shown})


def _guideline_version(call: Call, project: Project) -> int | None:
    """The version that the client showed; by default the newest."""
    newest = project.guideline
    default = newest.version if newest else None
    return call.body.whole("guideline_version", 1, default or 1, default)


def _check(call: Call, assignment: Assignment, kind: Any, shown: dict[str, Any]) -> dict[str, Any]:
    """The payload with the item's numbers of the candidates, checked for the project's task."""
    if wrong := wrong_payload(assignment.project, kind, shown, len(assignment.order)):
        call.body.fail("payload", f"{wrong}; candidates are numbered as shown")
    return renumbered(shown, assignment.order)


def renumbered(payload: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The payload with the number n of each candidate replaced by order[n]."""
    changed = dict(payload)
    for name in ("better", "worse", "candidate"):
        if payload.get(name) is not None:
            changed[name] = order[payload[name]]
    for name in ("tie", "both_bad"):
        if name in payload:
            changed[name] = sorted(order[i] for i in payload[name])
    if "order" in payload:
        changed["order"] = [sorted(order[i] for i in group) for group in payload["order"]]
    return changed


def _shown_draft(assignment: Assignment) -> dict[str, Any] | None:
    """The payload of the draft, numbered as shown; None if it is a draft of a page."""
    draft = assignment.draft or {}
    kind, payload = KINDS[assignment.project.task], draft.get("payload")
    if isinstance(payload, dict) and is_payload(kind, payload, len(assignment.order)):
        back = [assignment.order.index(i) for i in range(len(assignment.order))]
        return renumbered(payload, back)
    return None
