"""Template contexts of the labelers' pages.

A template gets an item's texts, no database rows, so no page can reveal which model wrote what.
"""

from collections.abc import Mapping
from typing import Any

from django.http import Http404

from openpalm.feedback.accounts.access import ProjectRequest
from openpalm.feedback.items.model_names import is_blind
from openpalm.feedback.judgements import queue
from openpalm.feedback.judgements.payloads import axes, form_of, middle
from openpalm.feedback.judgements.words import LETTERS, describe_as_shown, pieces, step_label
from openpalm.feedback.labeling.markdown import answer_html, to_html
from openpalm.feedback.models import Assignment, Candidate, Guideline, Project, Response, Task
from openpalm.feedback.paging import id_of

LONG = 1800
"""characters of an answer from which answers scroll by themselves on wide screens"""
LEFT_SHOWN = 100
NUMBERED = (Task.RANKING,)


def page_context(request: ProjectRequest, error: str = "") -> dict[str, Any]:
    """What every page of labelers shows around its item."""
    project, user = request.project, request.user
    guideline = project.guideline
    last = (
        Response.objects.filter(project=project, user=user)
        .select_related("assignment__item")
        .order_by("-id")
        .first()
    )
    return {
        "project": project,
        "role": request.role,
        "error": error,
        "task": project.task,
        "guideline": guideline,
        "guideline_html": to_html(guideline.text) if guideline else "",
        "guidelines_changed": bool(
            guideline and last and last.guideline_version not in (None, guideline.version)
        ),
        "last": last_judgement(project, last) if last else None,
        "judged": Assignment.objects.filter(
            project=project, user=user, state=Assignment.State.SUBMITTED
        ).count(),
    }


def last_judgement(project: Project, last: Response) -> dict[str, Any] | None:
    """The line above an item: what the user did before, with the models' names if allowed."""
    if last.state in (Response.State.UNDONE, Response.State.DELETED):
        return None
    last.assignment.project = project
    names = [] if is_blind(project, last.assignment.item) else model_names(last.assignment)
    return {"words": describe_as_shown(last, last.assignment), "names": names}


def model_names(assignment: Assignment) -> list[tuple[str, str]]:
    """(name on the screen, name of the model) of each answer; only for projects that show it."""
    candidates = _candidates(assignment, "candidate__model")
    names = [(c.model.name if c.model else c.checkpoint) for c in candidates]
    return [(answer_name(assignment, i), name) for i, name in enumerate(names) if name]


def answer_name(assignment: Assignment, index: int) -> str:
    return str(index + 1) if assignment.project.task in NUMBERED else LETTERS[index]


def item_context(
    assignment: Assignment, form: Mapping[str, Any] | None = None, *, formatted: bool = False
) -> dict[str, Any]:
    """The item, and the form as it was last typed: `form`, else the draft.

    `formatted`: texts as HTML of their Markdown, too.
    """
    form = draft_form(assignment) if form is None else form
    candidates = _candidates(assignment, "candidate")
    project = assignment.project
    shown = [
        {
            "name": answer_name(assignment, index),
            "field": f"place_{index}",
            "place": form.get(f"place_{index}", ""),
            "pieces": pieces(candidate.text),
            "html": answer_html(candidate.text) if formatted else None,
        }
        for index, candidate in enumerate(candidates)
    ]
    return {
        "assignment_id": assignment.pk,
        "messages_shown": conversation(assignment.item.prompt.messages, formatted=formatted),
        "formatted": formatted,
        "answers": shown,
        "long": any(len(candidate.text) > LONG for candidate in candidates),
        "form": form,
        "elapsed_ms": form.get("elapsed_ms", ""),
        **_task_context(project, candidates, form),
    }


def conversation(
    messages: list[dict[str, str]], *, formatted: bool = False
) -> list[dict[str, Any]]:
    names = {"user": "User", "assistant": "Assistant", "system": "System"}
    return [
        {
            "role": message["role"],
            "name": names.get(message["role"], message["role"]),
            "pieces": pieces(message["content"]),
            "html": answer_html(message["content"]) if formatted else None,
        }
        for message in messages
    ]


def draft_form(assignment: Assignment) -> dict[str, Any]:
    """The draft as a form; an undone judgement comes back as it was."""
    draft = assignment.draft or {}
    if "payload" in draft:
        form = form_of(assignment, draft.get("kind", ""), draft["payload"])
        return form | {"reason": draft.get("reason", "")}
    return draft


def guideline_in(request: ProjectRequest) -> Guideline | None:
    """The guidelines in the `version` of the address, else the newest. Raises Http404."""
    wanted = request.GET.get("version", "")
    if not wanted:
        return request.project.guideline
    found = request.project.guidelines.filter(version=id_of(wanted)).first()
    if found is None:
        raise Http404("there is no such version of the guidelines")
    return found


def left_to_judge(request: ProjectRequest) -> str:
    """How many items wait for the user, counted up to LEFT_SHOWN."""
    waiting = queue.open_items(request.project, request.user).order_by()
    left = waiting[: LEFT_SHOWN + 1].count()
    return f"over {LEFT_SHOWN}" if left > LEFT_SHOWN else str(left)


def scale(project: Project, chosen: str) -> list[dict[str, Any]]:
    """The steps of the scale from "A is much better" to "B is much better"."""
    return [
        {
            "value": str(step),
            "label": step_label(project, step),
            "side": "tie" if step == middle(project) else "a" if step < middle(project) else "b",
            "chosen": chosen == str(step) or (chosen == "tie" and step == middle(project)),
        }
        for step in range(1, project.scale + 1)
    ]


def _task_context(
    project: Project, candidates: list[Candidate], form: Mapping[str, Any]
) -> dict[str, Any]:
    match project.task:
        case Task.PAIR | Task.CHAT:
            return {"steps": scale(project, form.get("choice", ""))}
        case Task.RANKING:
            return {"places": [str(place) for place in range(1, len(candidates) + 1)]}
        case Task.RATING:
            chosen = [(axis, form.get(f"axis_{i}", "")) for i, axis in enumerate(axes(project))]
            return {"axes": chosen, "values": ["1", "2", "3", "4", "5"]}
        case Task.EDIT:
            return {"text": form.get("text", candidates[0].text if candidates else "")}
        case Task.DEMONSTRATION:
            return {"text": form.get("text", "")}
    return {}


def _candidates(assignment: Assignment, related: str) -> list[Candidate]:
    """In the order of the screen."""
    places = list(assignment.item.places.select_related(related))
    return [places[position].candidate for position in assignment.order]
